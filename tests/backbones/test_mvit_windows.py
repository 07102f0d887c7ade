"""timm's MViTv2 with hybrid windows: timm's own results where both apply, and any size."""

import copy

import pytest
import torch

from helpers import pixels, tiny_model


timm = pytest.importorskip("timm")

from proscale_hf.backbones.mvit_windows import (
    HybridWindowAttention,
    from_windows,
    relative_positions,
    to_windows,
    use_hybrid_windows,
)


BACKBONE = {"model_type": "timm_backbone", "backbone": "mvitv2_tiny", "out_indices": [0, 1, 2, 3]}


@pytest.fixture(scope="module")
def mvit() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("mvitv2_tiny", features_only=True).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize(("stage", "block", "side"), [(0, 0, 56), (1, 0, 56), (1, 1, 28), (2, 2, 14), (3, 1, 7)])
@pytest.mark.parametrize("is_window", [False, True])
def test_one_window_is_timms_attention(mvit, stage, block, side, is_window):
    attention = mvit.model.stages[stage].blocks[block].attn
    tokens = torch.randn((2, side * side, attention.qkv.in_features), generator=torch.Generator().manual_seed(1))
    expected, expected_size = attention(tokens, [side, side])
    result, size = HybridWindowAttention(attention, side if is_window else None)(tokens, [side, side])
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert size == list(expected_size)


def test_windows_do_not_see_each_other(mvit):
    """But for what the pooling in front of them carries over their border."""
    attention = HybridWindowAttention(mvit.model.stages[0].blocks[0].attn, 56)
    tokens = torch.randn((1, 60, 112, 96), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, :, 64:] += 1.0
    before, after = (attention(t.flatten(1, 2), [60, 112])[0].unflatten(1, (60, 112)) for t in (tokens, changed))
    assert torch.equal(before[:, :, :56], after[:, :, :56])
    assert (before != after)[:, :, 56:64].any(dim=-1).float().mean() > 0.9  # unchanged, but next to what is changed


def test_padding_of_windows_is_not_seen(mvit):
    """A map a little larger than a window: its last rows attend to each other, and to nothing else."""
    attention = HybridWindowAttention(copy.deepcopy(mvit.model.stages[2].blocks[1].attn), 14)
    torch.nn.init.zeros_(attention.rel_pos_h)
    torch.nn.init.zeros_(attention.rel_pos_w)
    queries, keys, values = torch.randn((3, 1, 20, 14, 96), generator=torch.Generator().manual_seed(1))
    result = attention._attend(queries, keys, values)
    below = [part[:, 14:].flatten(1, 2) for part in (queries, keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(*below, scale=attention.scale)
    torch.testing.assert_close(result[:, 14:].flatten(1, 2), expected)


@pytest.mark.parametrize("size", [(5, 9), (4, 6), (1, 1), (8, 3)])
def test_windows_and_back(size):
    maps = torch.randn(2, *size, 3)
    windows = to_windows(maps, (4, 3))
    assert windows.shape == (2 * -(-size[0] // 4) * -(-size[1] // 3), 4, 3, 3)
    assert torch.equal(from_windows(windows, size), maps)


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (8, 2), (2, 8)])
def test_distances_without_resizing(queries, keys):
    """Entry 0 is for the first query and the last key, the last one for the last query and the first key."""
    table = torch.arange(2 * max(queries, keys) - 1.0)[:, None]
    positions = relative_positions(table, queries, keys)[..., 0]
    stretch = max(queries, keys)
    expected = torch.arange(queries)[:, None] * stretch / queries - torch.arange(keys) * stretch / keys
    torch.testing.assert_close(positions, expected - expected.min())


def test_names_and_shapes_of_weights_stay(mvit):
    adapted = copy.deepcopy(mvit)
    use_hybrid_windows(adapted)
    shapes = {name: tensor.shape for name, tensor in mvit.state_dict().items()}
    assert {name: tensor.shape for name, tensor in adapted.state_dict().items()} == shapes
    windows = [block.attn.window for stage in adapted.model.stages for block in stage.blocks]
    assert windows == [56, 56, None, 28, 14, 14, 14, None, 14, None]


def test_other_backbones_stay_as_they_are():
    model = timm.create_model("resnet18", features_only=True)
    modules = list(model.modules())
    use_hybrid_windows(model)
    assert list(model.modules()) == modules


def test_a_model_takes_any_size_and_trains():
    model = tiny_model(backbone_config=BACKBONE)
    for height, width in ((64, 96), (240, 320)):
        masks = model(pixels(1, height, width)).masks_queries_logits
        assert masks.shape == (1, 7, height // 4, width // 4) and masks.isfinite().all()
    model(pixels(1, 64, 96)).masks_queries_logits.sum().backward()
    attention = model.model.pixel_level_module.encoder._backbone.model.stages[0].blocks[0].attn
    assert attention.rel_pos_h.grad.abs().sum() > 0
