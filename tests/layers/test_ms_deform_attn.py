"""Deformable attention: against sampling written out, pixel by pixel, in float64."""

import pytest
import torch
from torch import nn

from helpers import tiny_config
from proscale_hf.layers import ms_deform_attn
from proscale_hf.layers.deformable_encoder import (
    DeformableEncoderLayer,
    SamplingOffsets,
    TokenGrid,
    maps_to_tokens,
    tokens_to_maps,
)
from proscale_hf.layers.ms_deform_attn import MultiScaleDeformableAttention


SHAPES = [(2, 3), (4, 5), (7, 1)]


def random_inputs(shapes, dtype=torch.float64, batch=2, queries=5, heads=2, head_dim=3, points=4):
    generator = torch.Generator().manual_seed(0)
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn((batch, tokens, heads, head_dim), generator=generator, dtype=torch.float64)
    locations = (
        torch.rand((batch, queries, heads, levels, points, 2), generator=generator, dtype=torch.float64) * 1.6 - 0.3
    )
    weights = torch.rand((batch, queries, heads, levels, points), generator=generator, dtype=torch.float64)
    return value.to(dtype), locations.to(torch.promote_types(dtype, torch.float32)), weights.to(dtype)


def run(value, locations, weights, shapes):
    starts = torch.tensor([0, *(h * w for h, w in shapes[:-1])]).cumsum(0)
    return MultiScaleDeformableAttention()(value, torch.tensor(shapes), shapes, starts, locations, weights, 64)


def written_out(value, locations, weights, shapes):
    """Bilinear sampling with zeros outside, one corner of one point at a time."""
    batch, _, heads, head_dim = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    output = torch.zeros(batch, queries, heads, head_dim, dtype=torch.float64)
    for b, q, h, level, p in torch.cartesian_prod(
        *map(torch.arange, (batch, queries, heads, len(shapes), points))
    ).tolist():
        height, width = shapes[level]
        start = sum(a * c for a, c in shapes[:level])
        x, y = (locations[b, q, h, level, p].double() * torch.tensor([width, height]) - 0.5).tolist()
        for row in (int(y // 1), int(y // 1) + 1):
            for column in (int(x // 1), int(x // 1) + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[b, q, h, level, p].double()
                    output[b, q, h] += share * value[b, start + row * width + column, h].double()
    return output.flatten(2)


@pytest.mark.parametrize("shapes", [SHAPES[:1], SHAPES[:2], SHAPES, [(1, 1)]])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)],
)
def test_values(shapes, dtype, precision):
    """16-bit results are the exact ones rounded once: everything is added up in float32."""
    inputs = random_inputs(shapes, dtype)
    output = run(*inputs, shapes)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), written_out(*inputs, shapes), rtol=precision, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 4, 6])
def test_parts_of_queries_at_inference(monkeypatch, tokens):
    inputs = random_inputs(SHAPES)
    expected = run(*inputs, SHAPES)  # with gradients, all queries at once
    monkeypatch.setattr(ms_deform_attn, "CPU_TOKENS", tokens)
    with torch.no_grad():
        torch.testing.assert_close(run(*inputs, SHAPES), expected)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_impossible_locations_add_nothing(wrong):
    value, locations, weights = random_inputs(SHAPES)
    locations[0, 2, 1, :, 0] = wrong
    without = weights.clone()
    without[0, 2, 1, :, 0] = 0
    torch.testing.assert_close(
        run(value, locations, weights, SHAPES), run(value, locations.nan_to_num(0, 0, 0), without, SHAPES)
    )


def test_gradients():
    inputs = [tensor.requires_grad_() for tensor in random_inputs(SHAPES[:2], queries=2)]
    assert torch.autograd.gradcheck(lambda *arguments: run(*arguments, SHAPES[:2]), inputs)


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
    torch.testing.assert_close(grid.reference_points[6 + 2 * 5 + 3], torch.tensor([3.5 / 5, 2.5 / 4]))
    assert torch.equal(grid.first(2).reference_points, grid.reference_points[:26])


def test_the_ring_of_eight_heads_is_a_square():
    offsets = SamplingOffsets(32, num_heads=8, num_levels=2, num_points=3)
    offsets.reset_parameters_to_ring()
    ring = offsets.bias.view(8, 2, 3, 2)
    torch.testing.assert_close(ring[1, 0, 2], torch.tensor([3.0, 3.0]))
    torch.testing.assert_close(ring[5, 1, 0], torch.tensor([-1.0, -1.0]))


def test_a_fresh_layer_averages_a_ring_around_each_token():
    """Heads look along evenly spread directions: on a linear ramp a value in the middle is its own average."""
    torch.manual_seed(0)
    layer = DeformableEncoderLayer(tiny_config(), num_levels=1)
    attention = layer.self_attn
    attention.sampling_offsets.reset_parameters_to_ring()
    for module in (attention.attention_weights, attention.value_proj, attention.output_proj):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    nn.init.eye_(attention.value_proj.weight)
    nn.init.eye_(attention.output_proj.weight)
    ramp = torch.arange(11.0).expand(1, 32, 11, 11)
    tokens = maps_to_tokens([ramp])
    output = tokens_to_maps(attention(tokens, torch.zeros_like(tokens), TokenGrid.of_maps([ramp])), [(11, 11)])[0]
    middle = output[0, :, 5, 5].view(4, 8)  # (heads, head_dim); directions right, down, left, up; 2.5 pixels on average
    torch.testing.assert_close(middle[:, 0], torch.tensor([7.5, 5.0, 2.5, 5.0]))


def test_a_layer_in_parts_gives_the_same(monkeypatch):
    layer = DeformableEncoderLayer(tiny_config(), num_levels=3).eval()
    channels = layer.fc1.in_features
    grid = TokenGrid.of_maps([torch.zeros(2, channels, *shape) for shape in SHAPES])
    tokens, positions = torch.randn(2, 33, channels), torch.randn(1, 33, channels)
    expected = layer(tokens, positions, grid, 20)  # with gradients, and so in one part
    monkeypatch.setattr(ms_deform_attn, "CPU_TOKENS", 10)
    with torch.no_grad():
        assert [part.shape[1] for part in ms_deform_attn.in_parts(tokens[:, :20])] == [5] * 4
        torch.testing.assert_close(layer(tokens, positions, grid, 20), expected)
