"""The tokens of several maps, deformable attention to them, and the layer made of it."""

import pytest
import torch
from torch import nn

from proscale_hf.layers import ms_deform_attn
from proscale_hf.layers.deformable_encoder import (
    AttentionLogits,
    DeformableAttention,
    DeformableEncoderLayer,
    SamplingOffsets,
    TokenGrid,
    maps_to_tokens,
    tokens_to_maps,
    valid_sizes,
)


SHAPES = [(2, 3), (4, 5), (7, 1)]


def randomized(module: nn.Module) -> nn.Module:
    """With weights that all have an effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def layer_of_three_maps() -> DeformableEncoderLayer:
    return randomized(
        DeformableEncoderLayer(32, num_heads=4, num_levels=3, num_points=4, feedforward_dim=48, dropout=0.1)
    )


def test_tokens_and_maps_are_inverse():
    maps = [torch.randn(2, 3, height, width) for height, width in SHAPES]
    tokens = maps_to_tokens(maps)
    assert tokens[1, 6 + 2 * 5 + 3, 1] == maps[1][1, 1, 2, 3]
    for a, b in zip(tokens_to_maps(tokens, SHAPES), maps, strict=True):
        assert torch.equal(a, b)


def test_token_grid():
    grid = TokenGrid.of_maps([torch.zeros(1, 8, height, width) for height, width in SHAPES])
    assert grid.level_start_index.tolist() == [0, 6, 26]
    assert grid.shapes.tolist() == [list(shape) for shape in SHAPES]
    assert grid.reference_points.shape == (1, 33, 1, 2) and grid.padding is None
    torch.testing.assert_close(grid.reference_points[0, 6 + 2 * 5 + 3, 0], torch.tensor([3.5 / 5, 2.5 / 4]))
    assert torch.equal(grid.first(2).reference_points, grid.reference_points[:, :26])


def padding_of(sizes, shapes):
    """For each map, (batch, height, width): True beyond the (height, width) that each image covers there."""
    masks = []
    for level, (height, width) in enumerate(shapes):
        mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
        for image, size in enumerate(sizes):
            mask[image, : size[level][0], : size[level][1]] = False
        masks.append(mask)
    return masks


# What two images cover of maps of these sizes; the second one fills them.
PADDED_SHAPES = [(2, 3), (4, 5)]
PADDING = padding_of([[(1, 2), (2, 3)], [(2, 3), (4, 5)]], PADDED_SHAPES)


def test_valid_sizes():
    assert valid_sizes(PADDING).tolist() == [[[1, 2], [2, 3]], [[2, 3], [4, 5]]]


def test_token_grid_with_padding():
    """A token has its place in the image, and looks for the same place of the image in another map."""
    maps = [torch.zeros(2, 8, *shape) for shape in PADDED_SHAPES]
    grid = TokenGrid.of_maps(maps, PADDING)
    assert grid.reference_points.shape == (2, 26, 2, 2)
    token = 6 + 1 * 5 + 2  # row 1, column 2 of the second map
    in_image = torch.tensor([2.5 / 3, 1.5 / 2])
    torch.testing.assert_close(grid.reference_points[0, token, 0], in_image * torch.tensor([2 / 3, 1 / 2]))
    torch.testing.assert_close(grid.reference_points[0, token, 1], torch.tensor([2.5 / 5, 1.5 / 4]))
    full = TokenGrid.of_maps(maps).reference_points[0]
    torch.testing.assert_close(grid.reference_points[1], full.expand(26, 2, 2))
    assert grid.padding[0].nonzero().flatten().tolist() == [2, 3, 4, 5, 9, 10, 14, 15, *range(16, 26)]
    assert not grid.padding[1].any()
    first = grid.first(1)
    assert torch.equal(first.reference_points, grid.reference_points[:, :6, :1])
    assert torch.equal(first.padding, grid.padding[:, :6])


def test_attention_logits_begin_at_zero():
    logits = AttentionLogits(32, 12)
    assert not logits.weight.any() and not logits.bias.any()


def test_weights_that_a_checkpoint_has_set_are_kept():
    offsets = randomized(SamplingOffsets(32, num_heads=2, num_levels=1, num_points=2))
    loaded = offsets.bias.clone()
    offsets.bias._is_hf_initialized = True  # as transformers marks them
    offsets.reset_parameters()
    assert torch.equal(offsets.bias, loaded) and not offsets.weight.any()


def test_the_ring_of_eight_heads_is_a_square():
    offsets = SamplingOffsets(32, num_heads=8, num_levels=2, num_points=3)
    ring = offsets.bias.view(8, 2, 3, 2)
    torch.testing.assert_close(ring[1, 0, 2], torch.tensor([3.0, 3.0]))
    torch.testing.assert_close(ring[5, 1, 0], torch.tensor([-1.0, -1.0]))


def test_a_fresh_layer_averages_a_ring_around_each_token():
    """Heads look along evenly spread directions: on a linear ramp a value in the middle is its own average."""
    attention = DeformableAttention(32, num_heads=4, num_levels=1, num_points=4)
    for module in (attention.value_proj, attention.output_proj):
        nn.init.eye_(module.weight)
        nn.init.zeros_(module.bias)
    ramp = torch.arange(11.0).expand(1, 32, 11, 11)
    tokens = maps_to_tokens([ramp])
    grid = TokenGrid.of_maps([ramp])
    output = tokens_to_maps(attention(tokens, tokens, grid, grid.reference_points), [(11, 11)])[0]
    middle = output[0, :, 5, 5].view(4, 8)  # (heads, head_dim); directions right, down, left, up; 2.5 pixels on average
    torch.testing.assert_close(middle[:, 0], torch.tensor([7.5, 5.0, 2.5, 5.0]))


def test_a_layer_in_parts_gives_the_same(monkeypatch):
    layer = layer_of_three_maps()
    channels = 32
    grid = TokenGrid.of_maps([torch.zeros(2, channels, *shape) for shape in SHAPES])
    tokens, positions = torch.randn(2, 33, channels), torch.randn(1, 33, channels)
    expected = layer(tokens, positions, grid, 20)  # with gradients, and so in one part
    monkeypatch.setattr(ms_deform_attn, "CPU_TOKENS", 10)
    with torch.no_grad():
        assert [part.shape[1] for part in ms_deform_attn.token_parts(tokens[:, :20])] == [5] * 4
        torch.testing.assert_close(layer(tokens, positions, grid, 20), expected)


@pytest.mark.parametrize("references", ["points", "boxes"])
def test_queries_that_are_no_tokens(references):
    """Each query looks for itself: alone it finds what it finds among others, whatever their number."""
    attention = randomized(DeformableAttention(32, num_heads=4, num_levels=3, num_points=4))
    grid = TokenGrid.of_maps([torch.zeros(2, 32, *shape) for shape in SHAPES])
    queries, tokens = torch.randn(2, 5, 32), torch.randn(2, 33, 32)
    reference_points = torch.rand(2, 5, 3, 2 if references == "points" else 4)
    found = attention(queries, tokens, grid, reference_points)
    assert found.shape == (2, 5, 32)
    for query in range(5):
        alone = attention(queries[:, [query]], tokens, grid, reference_points[:, [query]])
        torch.testing.assert_close(alone, found[:, [query]], rtol=1e-5, atol=1e-5)


def test_what_the_padding_holds_has_no_effect():
    layer = randomized(DeformableEncoderLayer(32, 4, num_levels=2, num_points=4, feedforward_dim=48, dropout=0.0))
    maps = [torch.randn(2, 32, *shape) for shape in PADDED_SHAPES]
    grid = TokenGrid.of_maps(maps, PADDING)
    tokens, positions = maps_to_tokens(maps), torch.randn(1, 26, 32)
    outputs = [
        layer(tokens.masked_fill(grid.padding[..., None], content), positions, grid)[~grid.padding]
        for content in (0.0, 3.0, float("nan"))
    ]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    everywhere = layer(tokens, positions, TokenGrid.of_maps(maps))
    torch.testing.assert_close(everywhere[1], layer(tokens, positions, grid)[1], rtol=1e-5, atol=1e-5)  # fills its maps
    assert (everywhere[~grid.padding] - outputs[0]).abs().max() > 1e-3


def test_an_image_alone_gives_what_it_gives_with_padding():
    """With one map. With several, each of them may be padded by another share."""
    layer = randomized(DeformableEncoderLayer(32, 4, num_levels=1, num_points=4, feedforward_dim=48, dropout=0.0))
    image, positions = torch.randn(1, 32, 3, 4), torch.randn(1, 32, 3, 4)
    alone = layer(maps_to_tokens([image]), maps_to_tokens([positions]), TokenGrid.of_maps([image]))
    padded, padded_positions = (nn.functional.pad(each, (0, 3, 0, 2), value=7.0) for each in (image, positions))
    grid = TokenGrid.of_maps([padded], padding_of([[(3, 4)]], [(5, 7)]))
    among = layer(maps_to_tokens([padded]), maps_to_tokens([padded_positions]), grid)
    torch.testing.assert_close(among[~grid.padding], alone[0], rtol=1e-5, atol=1e-5)
