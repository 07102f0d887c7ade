"""The compiled operators against plain PyTorch in float64: values, gradients, and what PyTorch asks of operators."""

import os
import subprocess
import sys

import pytest
import torch


TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = {
    "one level": [(5, 9)],
    "two levels": [(3, 1), (1, 7)],
    "three levels": [(4, 6), (8, 12), (16, 24)],
    "four levels, one pixel": [(1, 1), (2, 1), (1, 2), (13, 11)],
}


class Inputs:
    """Arguments of both forms that mean the same; samples keep away from pixel borders, where gradients jump.

    Some samples are outside their maps, a few of them far outside.
    """

    def __init__(self, shapes, batch=2, queries=37, heads=2, head_dim=32, points=4, seed=0, per_level=False):
        generator = torch.Generator().manual_seed(seed)
        levels = len(shapes)
        self.shapes = shapes
        sizes = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64)
        self.sizes = sizes[:, None]  # (levels, 1, 2)
        span = torch.rand((batch, queries, heads, levels, points, 2), generator=generator, dtype=torch.float64)
        pixels = (span * (self.sizes + 4) - 3).floor()
        pixels = torch.where(torch.rand(pixels.shape, generator=generator) < 0.02, pixels * 1000, pixels)
        pixels += 0.1 + 0.8 * torch.rand(pixels.shape, generator=generator, dtype=torch.float64)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        tokens = sum(height * width for height, width in shapes)
        self.value = normal(batch, tokens, heads, head_dim)
        self.logits = normal(batch, queries, heads, levels * points)
        self.weights = self.logits.softmax(-1).view(pixels.shape[:-1])
        points_shape = (batch, queries, levels if per_level else 1, 2)
        self.reference = torch.rand(points_shape, generator=generator, dtype=torch.float64)
        self.locations = (pixels + 0.5) / self.sizes
        self.offsets = (self.locations - self.reference[:, :, None, :, None]) * self.sizes
        self.grad_output = normal(batch, queries, heads * head_dim)

    def arguments(self, fused: bool, dtype=torch.float64, position_dtype=None, score_dtype=None):
        """(tensors that have a gradient, tensors in the order of the function without the shapes)"""
        float_type = torch.promote_types(dtype, torch.float32)
        value = self.value.to(dtype)
        if fused:
            return (
                value,
                self.reference.to(float_type),
                self.offsets.to(position_dtype or float_type),
                self.logits.to(score_dtype or float_type),
            )
        return (value, self.locations.to(float_type), self.weights.to(score_dtype or float_type))


def run(function, inputs: Inputs, arguments, shapes=None):
    """Output, and gradients of all tensors."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in arguments]
    output = function(leaves[0], shapes or inputs.shapes, *leaves[1:])
    gradients = torch.autograd.grad(output, leaves, inputs.grad_output.to(output.dtype))
    return output.detach(), *gradients


def functions(kernel, fused: bool):
    name = "fused_ms_deform_attn" if fused else "ms_deform_attn"
    return getattr(kernel, name), getattr(kernel.reference, name)


def assert_close(results, expected, dtype):
    for result, right in zip(results, expected, strict=True):
        scale = right.abs().max().clamp(min=1)
        error = (result.double() - right.double()).abs().max() / scale
        assert error <= TOLERANCES[dtype], f"{tuple(right.shape)}: {error:.2e}"


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def fused(request):
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients_are_those_of_float64(kernel, fused, shapes, dtype):
    compiled, plain = functions(kernel, fused)
    inputs = Inputs(shapes)
    inputs.value, inputs.grad_output = inputs.value.to(dtype).double(), inputs.grad_output.to(dtype).double()
    expected = run(plain, inputs, inputs.arguments(fused))
    assert_close(run(compiled, inputs, inputs.arguments(fused, dtype)), expected, dtype)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 40, 64, 128])
@pytest.mark.parametrize("points", [1, 3, 8])
def test_any_head_size_and_number_of_points(kernel, fused, head_dim, points):
    compiled, plain = functions(kernel, fused)
    inputs = Inputs([(6, 5), (3, 3), (2, 4)], head_dim=head_dim, points=points, heads=3)
    expected = run(plain, inputs, inputs.arguments(fused))
    assert_close(run(compiled, inputs, inputs.arguments(fused, torch.float32)), expected, torch.float32)


@pytest.mark.parametrize("position_dtype", TOLERANCES)
@pytest.mark.parametrize("score_dtype", TOLERANCES)
def test_offsets_and_logits_of_any_type(kernel, position_dtype, score_dtype):
    compiled, plain = functions(kernel, fused=True)
    inputs = Inputs([(6, 5), (3, 3)], points=3)
    inputs.offsets = inputs.offsets.to(position_dtype).double()
    inputs.logits = inputs.logits.to(score_dtype).double()
    # Where rounding took an offset to the border of a pixel, move it off again.
    pixels = (inputs.reference[:, :, None, :, None] + inputs.offsets / inputs.sizes) * inputs.sizes - 0.5
    border = (pixels - pixels.round()).abs() < 1e-3
    inputs.offsets = torch.where(border, torch.full_like(inputs.offsets, 0.25), inputs.offsets)
    expected = run(plain, inputs, inputs.arguments(True))
    arguments = inputs.arguments(True, torch.float32, position_dtype, score_dtype)
    results = run(compiled, inputs, arguments)
    assert [result.dtype for result in results[3:]] == [position_dtype, score_dtype]
    for result, right, dtype in zip(
        results, expected, [torch.float32, torch.float32, position_dtype, position_dtype, score_dtype], strict=True
    ):
        assert_close([result], [right], dtype)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("per_level", [False, True])
def test_reference_points_broadcast(kernel, images, per_level):
    compiled, plain = functions(kernel, fused=True)
    inputs = Inputs([(6, 5), (3, 3)], per_level=per_level)
    inputs.reference = inputs.reference[:images]
    inputs.offsets = (inputs.locations - inputs.reference[:, :, None, :, None]) * inputs.sizes
    expected = run(plain, inputs, inputs.arguments(True))
    assert_close(run(compiled, inputs, inputs.arguments(True, torch.float32)), expected, torch.float32)


def test_locations_that_are_not_numbers_are_outside(kernel, fused):
    compiled, plain = functions(kernel, fused)
    inputs = Inputs([(6, 5), (3, 3)], queries=6)
    positions = inputs.offsets if fused else inputs.locations
    for query, number in enumerate((float("nan"), float("inf"), float("-inf"), 1e38)):
        positions[:, query, :, 0, 1] = number
        positions[:, query, :, 1, 0, 1] = number
    expected = run(plain, inputs, inputs.arguments(fused))
    assert all(tensor.isfinite().all() for tensor in expected)
    assert_close(run(compiled, inputs, inputs.arguments(fused, torch.float32)), expected, torch.float32)


def test_values_outside_do_not_leak(kernel):
    """A sample outside its map multiplies nothing, not even an infinite value at the border, by zero."""
    value = torch.full((1, 4, 1, 8), float("inf"))
    output = kernel.ms_deform_attn(value, [(2, 2)], torch.full((1, 1, 1, 1, 1, 2), -3.0), torch.ones(1, 1, 1, 1, 1))
    assert torch.equal(output, torch.zeros(1, 1, 8))


def test_extreme_logits(kernel):
    compiled, plain = functions(kernel, fused=True)
    inputs = Inputs([(6, 5), (3, 3)], queries=4)
    inputs.logits[:, 0] *= 1e4
    inputs.logits[:, 1] -= 1e4
    inputs.logits[:, 2, :, 1:] = float("-inf")
    inputs.logits = inputs.logits.float().double()
    expected = run(plain, inputs, inputs.arguments(True))
    assert_close(run(compiled, inputs, inputs.arguments(True, torch.float32)), expected, torch.float32)


@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_do(kernel, fused, batch, queries):
    compiled, _ = functions(kernel, fused)
    inputs = Inputs([(2, 3), (1, 1)], batch=batch, queries=queries)
    arguments = inputs.arguments(fused, torch.float32)
    output, *gradients = run(compiled, inputs, arguments)
    assert output.shape == (batch, queries, 64)
    for gradient, tensor in zip(gradients, arguments, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_views(kernel, fused):
    """A value that is part of something larger, and everything else in another order of memory."""
    compiled, _ = functions(kernel, fused)
    inputs = Inputs([(6, 5), (3, 3)], heads=2, head_dim=16)
    arguments = inputs.arguments(fused, torch.float32)
    expected = run(compiled, inputs, arguments)

    def view(tensor, index):
        if index == 0:  # the second of three, with heads before tokens in memory
            stacked = torch.stack((tensor, tensor, tensor), dim=3).transpose(1, 2).contiguous().transpose(1, 2)
            return stacked[:, :, :, 1]
        return tensor.flip(0).transpose(0, -1).contiguous().transpose(0, -1).flip(0)

    views = [view(tensor, index) for index, tensor in enumerate(arguments)]
    assert not any(tensor.is_contiguous() for tensor in views)
    assert all(torch.equal(left, right) for left, right in zip(views, arguments, strict=True))
    leaves = [tensor.detach().requires_grad_() for tensor in views]
    output = compiled(leaves[0], inputs.shapes, *leaves[1:])
    grad_output = inputs.grad_output.float().transpose(1, 2).contiguous().transpose(1, 2)
    results = (output, *torch.autograd.grad(output, leaves, grad_output))
    assert all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))
    # channels that are not adjacent
    spread = arguments[0].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(compiled(spread, inputs.shapes, *arguments[1:]), expected[0])


def test_expanded_gradient(kernel, fused):
    """`output.sum()` hands down a gradient whose strides are all 0."""
    compiled, plain = functions(kernel, fused)
    inputs = Inputs([(6, 5), (3, 3)])
    gradients = []
    for function, dtype in ((compiled, torch.float32), (plain, torch.float64)):
        leaves = [tensor.requires_grad_() for tensor in inputs.arguments(fused, dtype)]
        function(leaves[0], inputs.shapes, *leaves[1:]).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert_close(*gradients, torch.float32)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("batch", "heads"), [(1, 2), (2, 3)])
def test_threads(kernel, fused, threads, batch, heads):
    """Few heads for the threads, or a number that they cannot share evenly; twice the same to the last bit."""
    compiled, plain = functions(kernel, fused)
    inputs = Inputs([(4, 5), (2, 2)], batch=batch, heads=heads, queries=500)
    expected = run(plain, inputs, inputs.arguments(fused))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = run(compiled, inputs, inputs.arguments(fused, torch.float32))
        second = run(compiled, inputs, inputs.arguments(fused, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert_close(first, expected, torch.float32)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_other_head_sizes_and_types_take_the_pytorch_path(kernel, fused):
    compiled, plain = functions(kernel, fused)
    for head_dim, dtype in ((12, torch.float32), (8, torch.float64)):
        inputs = Inputs([(6, 5), (3, 3)], head_dim=head_dim)
        arguments = inputs.arguments(fused, dtype)
        result, expected = (function(arguments[0], inputs.shapes, *arguments[1:]) for function in (compiled, plain))
        assert torch.equal(result, expected)


def test_gradcheck_of_the_plain_path(kernel, fused):
    """What the gradients above are compared with is itself right."""
    _, plain = functions(kernel, fused)
    inputs = Inputs([(3, 4), (2, 2)], batch=1, queries=3, heads=1, head_dim=2, points=2)
    leaves = [tensor.requires_grad_() for tensor in inputs.arguments(fused)]
    assert torch.autograd.gradcheck(lambda value, *others: plain(value, inputs.shapes, *others), leaves)


def test_opcheck(kernel, fused):
    inputs = Inputs([(6, 5), (3, 3)], head_dim=16)
    ops = kernel.operators.ops
    forward = ops.fused_ms_deform_attn_forward if fused else ops.ms_deform_attn_forward
    backward = ops.fused_ms_deform_attn_backward if fused else ops.ms_deform_attn_backward
    value, *others = inputs.arguments(fused, torch.float32)
    flat = kernel.operators.flat(inputs.shapes)
    leaves = [tensor.clone().requires_grad_() for tensor in (value, *others)]
    torch.library.opcheck(forward.default, (leaves[0], flat, *leaves[1:]))
    torch.library.opcheck(backward.default, (inputs.grad_output.float(), value, flat, *others, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(kernel, fused, dynamic):
    compiled, _ = functions(kernel, fused)
    layers = kernel.layers
    layer = (layers.FusedMultiScaleDeformableAttention if fused else layers.MultiScaleDeformableAttention)()
    for seed, queries in enumerate((20, 33)):
        inputs = Inputs([(6, 5), (3, 3)], queries=queries, seed=seed)
        sizes = torch.tensor(inputs.shapes)
        starts = torch.tensor([0, 30])
        arguments = inputs.arguments(fused, torch.float32)

        def through_layer(value, shapes, *others, sizes=sizes, starts=starts):
            rest = () if fused else (64,)
            return layer(value * 2, sizes, shapes, starts, *others, *rest) + 1

        def direct(value, shapes, *others):
            return compiled(value * 2, shapes, *others) + 1

        torch._dynamo.reset()
        traced = torch.compile(through_layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for result, right in zip(run(traced, inputs, arguments), run(direct, inputs, arguments), strict=True):
            torch.testing.assert_close(result, right)


def test_autocast_keeps_locations_in_float32(kernel):
    compiled, plain = functions(kernel, fused=True)
    inputs = Inputs([(100, 168)], head_dim=16, points=2)
    value, reference, offsets, logits = inputs.arguments(True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = compiled(value.bfloat16(), inputs.shapes, reference, offsets.bfloat16().float(), logits.bfloat16())
        locations = inputs.locations.float()
        same = kernel.ms_deform_attn(value.bfloat16(), inputs.shapes, locations, inputs.weights.bfloat16())
    assert output.dtype == same.dtype == torch.bfloat16
    expected = plain(inputs.value.bfloat16().double(), inputs.shapes, *inputs.arguments(True)[1:])
    assert_close([same], [expected], torch.bfloat16)


def test_second_derivative_is_refused(kernel, fused):
    compiled, _ = functions(kernel, fused)
    inputs = Inputs([(2, 3)])
    leaves = [tensor.requires_grad_() for tensor in inputs.arguments(fused, torch.float32)]
    output = compiled(leaves[0], inputs.shapes, *leaves[1:])
    (gradient,) = torch.autograd.grad(output.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_deterministic_algorithms(kernel, fused):
    compiled, _ = functions(kernel, fused)
    inputs = Inputs([(6, 5), (3, 3)])
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(compiled, inputs, inputs.arguments(fused, torch.float32)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


BAD_ARGUMENTS = {
    "tokens": (lambda a: a.update(value=a["value"][:, :-1]), "value has 38 tokens, spatial_shapes make 39"),
    "levels": (lambda a: a.update(shapes=[(6, 5)]), "height and width of 2 levels"),
    "no pixels": (lambda a: a.update(shapes=[(6, 0), (3, 13)]), "must be between 1 and"),
    "dimensions": (lambda a: a.update(value=a["value"][0]), "value must be"),
    "heads": (lambda a: a.update(value=a["value"][:, :, :1]), "must have the shape"),
    "batch": (lambda a: a.update(value=a["value"][:1]), "must have the shape"),
    "scores": (lambda a: a.update(scores=a["scores"][..., :-1]), "must have the shape"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named(kernel, fused, case):
    compiled, _ = functions(kernel, fused)
    inputs = Inputs([(6, 5), (3, 3)])
    value, *middle, scores = inputs.arguments(fused, torch.float32)
    arguments = {"value": value, "shapes": inputs.shapes, "scores": scores}
    change, message = BAD_ARGUMENTS[case]
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        compiled(arguments["value"], arguments["shapes"], *middle, arguments["scores"])


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_older_processors(variant, capability):
    """The same tests in the code that older processors run."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("runs inside itself")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "float64 or head_size or any_type or not_numbers or extreme"]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
