"""The encoders behind their common contract, and what each of them does."""

import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import RTDetrConfig
from transformers.models.rt_detr.modeling_rt_detr import RTDetrHybridEncoder

from helpers import tiny_config
from paths import EXAMPLES
from proscale_hf import ProScaleMask2FormerForUniversalSegmentation, ProScaleMask2FormerImageProcessorPil
from proscale_hf.encoders.choice import ENCODER_CLASSES
from proscale_hf.encoders.configuration import ENCODERS
from proscale_hf.encoders.lite import LiteEncoder
from proscale_hf.encoders.proscale import ProScaleEncoder, TokenRecalibration
from proscale_hf.encoders.rt import RTEncoder
from proscale_hf.layers.deformable_encoder import DeformableEncoderLayer, TokenGrid, maps_to_tokens


SHAPES = [(2, 3), (4, 6), (8, 12)]
STRIDES = (4, 8, 16, 32, 64)


def maps(channels: int = 32, seed: int = 0, shapes: list[tuple[int, int]] = SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((2, channels, height, width), generator=generator) for height, width in shapes]


def randomized(module: nn.Module) -> nn.Module:
    """With weights and batch statistics that all have an effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=generator))
                norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.5)
    return module.eval()


def of_levels(levels: int, **changes: Any) -> nn.Module:
    """An encoder of so many maps."""
    strides = STRIDES[: levels + 1]
    config = tiny_config(feature_strides=strides, encoder_stage_layers=(1,) * levels, **changes)
    return randomized(ENCODER_CLASSES[config.encoder](config))


def test_every_name_of_the_configuration_has_an_encoder():
    assert set(ENCODER_CLASSES) == set(ENCODERS)


@pytest.mark.parametrize("encoder", sorted(ENCODER_CLASSES))
def test_contract(encoder):
    module = randomized(ENCODER_CLASSES[encoder](tiny_config(encoder=encoder)))
    given = maps()
    output = module(given, [m[:1] for m in maps(seed=1)])
    assert [m.shape for m in output] == [m.shape for m in maps()]
    assert all(torch.equal(a, b) for a, b in zip(given, maps(), strict=True))  # not written to
    alone = module([m[1:] for m in maps()], [m[:1] for m in maps(seed=1)])
    for together, single in zip(output, alone, strict=True):
        torch.testing.assert_close(together[1:], single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recalibration", ["none", "linear", "conv"])
@pytest.mark.parametrize("encoder", sorted(set(ENCODER_CLASSES) - {"rt"}))
def test_what_the_padding_holds_has_no_effect(encoder, recalibration):
    config = tiny_config(encoder=encoder, encoder_layers=3, token_recalibration=recalibration)
    module = randomized(ENCODER_CLASSES[encoder](config))
    padding = [torch.zeros(2, height, width, dtype=torch.bool) for height, width in SHAPES]
    for mask, (height, width) in zip(padding, [(2, 2), (3, 4), (6, 7)], strict=True):
        mask[0, height:] = True
        mask[0, :, width:] = True
    outputs = []
    for content in (0.0, 5.0):
        filled = [m.masked_fill(mask[:, None], content) for m, mask in zip(maps(), padding, strict=True)]
        outputs.append(module(filled, maps(seed=1), padding))
    full = module(maps(), maps(seed=1))
    for mask, zeros, fives, without in zip(padding, *outputs, full, strict=True):
        assert torch.equal(zeros.movedim(1, -1)[~mask], fives.movedim(1, -1)[~mask])
        assert (zeros - without)[0, :, 0, 0].abs().max() > 1e-4
        torch.testing.assert_close(zeros[1], without[1], rtol=1e-4, atol=1e-5)  # the second image fills its maps


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("encoder", sorted(ENCODER_CLASSES))
def test_any_number_of_levels(encoder, levels):
    if encoder == "lite" and levels == 1:
        pytest.skip("refused by the configuration")
    shapes = [(1, 2), (2, 3), (4, 6), (8, 12)][-levels:]  # (2, 3) is not twice (1, 2): sizes are rounded up
    output = of_levels(levels, encoder=encoder)(maps(shapes=shapes), maps(seed=1, shapes=shapes))
    assert [m.shape[-2:] for m in output] == shapes


@pytest.mark.parametrize("encoder", sorted(ENCODER_CLASSES))
def test_every_map_depends_on_every_other(encoder):
    module = randomized(ENCODER_CLASSES[encoder](tiny_config(encoder=encoder, encoder_layers=3)))
    for level in range(3):
        changed = [maps(seed=7)[i] if i == level else m for i, m in enumerate(maps())]
        for before, after in zip(module(maps(), maps(seed=1)), module(changed, maps(seed=1)), strict=True):
            assert (before - after).abs().max() > 1e-3


@pytest.fixture(scope="module")
def scenes() -> dict:
    """A batch of demo scenes, ready for a model."""
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    sys.path.append(str(EXAMPLES))
    from demo_scenes import STUFF_LABEL_IDS, DemoScenes

    images = DemoScenes(4, "train", size=(128, 192))
    processor = ProScaleMask2FormerImageProcessorPil(
        size={"height": 64, "width": 96}, label_ids_to_fuse=STUFF_LABEL_IDS
    )
    return processor(
        images=[scene.image for scene in images],
        segmentation_maps=[scene.segment_ids for scene in images],
        instance_id_to_semantic_id=[scene.instance_id_to_semantic_id for scene in images],
        return_tensors="pt",
    )


@pytest.mark.parametrize("encoder", sorted(ENCODER_CLASSES))
def test_the_loss_falls_on_demo_scenes(encoder, scenes):
    torch.manual_seed(0)
    num_labels = 1 + max(int(labels.max()) for labels in scenes["class_labels"])
    config = tiny_config(encoder=encoder, num_labels=num_labels, num_queries=20)
    model = ProScaleMask2FormerForUniversalSegmentation(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(**scenes).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses


# -- PRO-SCALE


def test_levels_seen_grow_with_the_stages():
    encoder = ProScaleEncoder(tiny_config(encoder_stage_layers=(2, 1, 3)))
    assert [layer.self_attn.num_levels for layer in encoder.layers] == [1, 1, 2, 3, 3, 3]
    lengths = []
    for layer in encoder.layers:
        layer.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    encoder(maps(), maps())
    assert lengths == [6, 6, 30, 126, 126, 126]


@pytest.mark.parametrize("recalibration", ["none", "linear"])
def test_the_finest_map_enters_early_stages_only_through_recalibration(recalibration):
    """With a last stage that is cut off, the coarse maps depend on the finest one just by the re-calibration."""
    encoder = randomized(
        ProScaleEncoder(tiny_config(encoder_stage_layers=(1, 1, 1), token_recalibration=recalibration))
    )
    entering = []
    encoder.layers[1].register_forward_hook(lambda module, arguments, output: entering.append(output))
    changed = [*maps()[:2], maps(seed=7)[2]]
    encoder(maps(), maps(seed=1))
    encoder(changed, maps(seed=1))
    assert torch.equal(*entering) is (recalibration == "none")


def test_stage_residual_adds_the_stage_input_after_each_layer_but_in_the_last_stage():
    plain = randomized(ProScaleEncoder(tiny_config(encoder_stage_layers=(1, 1, 1))))
    residual = randomized(ProScaleEncoder(tiny_config(encoder_stage_layers=(1, 1, 1), stage_residual=True)))
    inputs, outputs = [], []
    for layer in residual.layers:
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        layer.register_forward_hook(lambda _, arguments, output: outputs.append(output))
    last = residual(maps(), maps(seed=1))
    torch.testing.assert_close(inputs[1][:, :6], outputs[0] + inputs[0])
    torch.testing.assert_close(inputs[2][:, :30], outputs[1] + inputs[1])
    torch.testing.assert_close(last[0].flatten(2).transpose(1, 2), outputs[2][:, :6])
    assert (plain(maps(), maps(seed=1))[0] - last[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_recalibration_is_the_papers_equation(kind):
    config = tiny_config(token_recalibration=kind, token_recalibration_temperature=0.5)
    module = randomized(TokenRecalibration(config))
    coarse, _, finest = maps()
    resized = nn.functional.interpolate(finest, size=(2, 3), mode="bilinear", align_corners=False)
    weight = module.projection.weight.flatten()
    logits = torch.einsum("bchw,c->bhw", resized, weight) + module.projection.bias
    torch.testing.assert_close(module(coarse, finest), coarse * (0.5 * logits).sigmoid()[:, None])


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_original_layout_mixes_positions_and_channels(kind):
    settings = {"token_recalibration": kind, "token_recalibration_temperature": 1.0}
    paper = randomized(TokenRecalibration(tiny_config(**settings)))
    original = randomized(TokenRecalibration(tiny_config(**settings, token_recalibration_layout="original")))
    coarse, _, finest = maps()
    result = original(coarse, finest)
    assert result.shape == coarse.shape
    assert (result - paper(coarse, finest)).abs().max() > 1e-2
    constant = torch.full_like(finest, 0.7)  # where all values are the same there is nothing to mix
    torch.testing.assert_close(original(coarse, constant), paper(coarse, constant))


# -- Lite-DETR


def test_only_the_last_layer_changes_the_finest_map():
    """Against full layers, whose results for the finest map are thrown away in all layers but the last."""
    encoder = randomized(LiteEncoder(tiny_config(encoder="lite", encoder_layers=4)))
    grid, positions = TokenGrid.of_maps(maps()), maps_to_tokens([m[:1] for m in maps(seed=1)])
    tokens = maps_to_tokens(maps())
    is_coarse = torch.arange(tokens.shape[1])[:, None] < sum(height * width for height, width in SHAPES[:-1])
    for index, layer in enumerate(encoder.layers):
        is_updated = is_coarse | (index == 3)
        tokens = torch.where(is_updated, layer(tokens, positions, grid), tokens)
    output = maps_to_tokens(encoder(maps(), [m[:1] for m in maps(seed=1)]))
    torch.testing.assert_close(output, tokens, rtol=1e-5, atol=1e-5)


def test_the_coarse_tokens_attend_to_all():
    encoder = randomized(LiteEncoder(tiny_config(encoder="lite", encoder_layers=3)))
    lengths = []
    for layer in encoder.layers:
        layer.register_forward_hook(lambda _, arguments, out: lengths.append((arguments[0].shape[1], out.shape[1])))
    encoder(maps(), maps(seed=1))
    assert lengths == [(126, 30), (126, 30), (126, 126)]


@pytest.mark.parametrize("num_queries", [1, 6, 30, 126])
def test_tokens_that_do_not_attend_change_nothing_for_those_that_do(num_queries):
    layer = randomized(DeformableEncoderLayer(32, 4, num_levels=3, num_points=4, feedforward_dim=48, dropout=0.0))
    grid, positions = TokenGrid.of_maps(maps()), maps_to_tokens(maps(seed=1))
    some = layer(maps_to_tokens(maps()), positions, grid, num_queries)
    every = layer(maps_to_tokens(maps()), positions, grid)
    torch.testing.assert_close(some, every[:, :num_queries], rtol=1e-5, atol=1e-5)


# -- RT-DETR


# names of modules here, and in transformers
RT_DETR_NAMES = {
    "attention.self_attn.out_proj": "aifi.0.layers.0.self_attn.o_proj",
    "attention.fc": "aifi.0.layers.0.mlp.fc",
    "attention": "aifi.0.layers.0",
    "lateral": "lateral_convs",
    "top_down": "fpn_blocks",
    "downsampling": "downsample_convs",
    "bottom_up": "pan_blocks",
    ".through": ".conv1",
    ".past": ".conv2",
    ".blocks": ".bottlenecks",
    ".wide": ".conv1",
    ".pointwise": ".conv2",
}


def name_in_transformers(name: str) -> str:
    module, tensor = name.rsplit(".", 1)
    if name.split(".")[0] != "attention":  # a convolution is the first, and its norm the second in a sequence
        module = module[:-2] + {".0": ".conv", ".1": ".norm"}[module[-2:]]
    for here, there in RT_DETR_NAMES.items():
        if module.startswith(here) or here[0] == ".":
            module = module.replace(here, there, 1)
    return f"{module}.{tensor}"


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("levels", [2, 3, 4])
def test_agrees_with_rt_detr_of_transformers(levels, is_training):
    encoder = of_levels(levels, encoder="rt")
    settings = {
        "encoder_in_channels": [32] * levels,
        "feat_strides": list(STRIDES[1 : levels + 1]),
        "encode_proj_layers": [levels - 1],
        "encoder_hidden_dim": 32,
        "encoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "num_attention_heads": 4,
    }
    reference = RTDetrHybridEncoder(RTDetrConfig(**settings))
    reference.load_state_dict({name_in_transformers(name): tensor for name, tensor in encoder.state_dict().items()})
    for module in (encoder, reference):
        module.train(is_training)
    given = maps(shapes=[(3, 4), *((3 * 2**i, 4 * 2**i) for i in range(1, levels))])
    # transformers embeds positions in another way
    positions = reference.aifi[0].position_embedding(width=4, height=3, device=given[0].device, dtype=torch.float32)
    positions = positions.transpose(1, 2).unflatten(2, (3, 4))
    expected = reference(inputs_embeds=given[::-1]).last_hidden_state
    for ours, theirs in zip(encoder(given, [positions]), reversed(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_steps_between_strides_other_than_two():
    config = tiny_config(encoder="rt", feature_strides=(4, 8, 32), encoder_stage_layers=(1, 1))
    output = randomized(RTEncoder(config))(maps(shapes=[(2, 3), (7, 11)]), maps(shapes=[(2, 3)]))
    assert [m.shape[-2:] for m in output] == [(2, 3), (7, 11)]
