"""The operation: against sampling written out, pixel by pixel, and against the kernel's readable path, in float64."""

import importlib.util

import pytest
import torch

from paths import ROOT
from proscale_hf.layers import ms_deform_attn
from proscale_hf.layers.ms_deform_attn import FusedMultiScaleDeformableAttention, MultiScaleDeformableAttention


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


@pytest.fixture(scope="module")
def readable():
    """`reference.py` of the kernel's package."""
    path = ROOT / "kernels" / "ms_deform_attn" / "torch-ext" / "ms_deform_attn" / "reference.py"
    spec = importlib.util.spec_from_file_location("readable_ms_deform_attn", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fused_inputs(numbers, images, reference_levels, queries):
    """Value, references, offsets and logits of two images; samples lie inside and outside of their maps."""
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    heads, levels, points = 2, len(SHAPES), 3
    return (
        torch.randn((2, sum(h * w for h, w in SHAPES), heads, 4), **options),
        torch.rand((images, queries, reference_levels, numbers), **options),
        2 * torch.randn((2, queries, heads, levels, points, 2), **options),
        torch.randn((2, queries, heads, levels * points), **options),
    )


def run_fused(value, references, offsets, logits):
    sizes, starts = torch.tensor(SHAPES), torch.tensor([0, 6, 26])
    return FusedMultiScaleDeformableAttention()(value, sizes, SHAPES, starts, references, offsets, logits)


@pytest.mark.parametrize("queries", [1, 5, 33, 50])  # of 33 tokens
@pytest.mark.parametrize("reference_levels", [1, len(SHAPES)])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("numbers", [2, 4], ids=["points", "boxes"])
def test_the_fast_path_gives_what_the_readable_one_gives(readable, numbers, images, reference_levels, queries):
    results = []
    for function in (run_fused, lambda value, *others: readable.fused_ms_deform_attn(value, SHAPES, *others)):
        leaves = [leaf.requires_grad_() for leaf in fused_inputs(numbers, images, reference_levels, queries)]
        output = function(*leaves)
        results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


def test_offsets_of_a_box_are_in_units_of_its_half_size():
    """As many units as there are points lead from the centre to the edge."""
    value, _, offsets, logits = fused_inputs(4, 1, 1, queries=1)
    offsets[:] = torch.tensor([3.0, -3.0])  # of 3 points: to the upper right corner
    box = torch.tensor([[[[0.4, 0.5, 0.2, 0.6]]]], dtype=torch.float64)
    corner = torch.tensor([[[[0.5, 0.2]]]], dtype=torch.float64)
    torch.testing.assert_close(
        run_fused(value, box, offsets, logits), run_fused(value, corner, torch.zeros_like(offsets), logits)
    )


def test_references_that_are_neither_points_nor_boxes_are_refused():
    with pytest.raises(ValueError, match="must have 2 numbers"):
        run_fused(*fused_inputs(3, 1, 1, queries=2))
