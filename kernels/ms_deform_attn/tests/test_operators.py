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
    """Arguments of all forms that mean the same; samples keep away from pixel borders, where gradients jump.

    Forms are "plain", with locations and weights, and two fused ones: offsets from "points" or from "boxes".

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
        self.box_sizes = 0.1 + torch.rand(points_shape, generator=generator, dtype=torch.float64)
        self.locations = (pixels + 0.5) / self.sizes
        self.points = points
        self.grad_output = normal(batch, queries, heads * head_dim)
        self.measure_offsets()

    def measure_offsets(self):
        """From the references to the locations, in the units of each form."""
        distances = self.locations - self.reference[:, :, None, :, None]
        self.offsets = {
            "points": distances * self.sizes,
            "boxes": distances / self.box_sizes[:, :, None, :, None] * 2 * self.points,
        }

    def references(self, form: str) -> torch.Tensor:
        return self.reference if form == "points" else torch.cat((self.reference, self.box_sizes), dim=-1)

    def arguments(self, form: str, dtype=torch.float64, position_dtype=None, score_dtype=None):
        """(tensors that have a gradient, tensors in the order of the function without the shapes)"""
        float_type = torch.promote_types(dtype, torch.float32)
        value = self.value.to(dtype)
        if form != "plain":
            return (
                value,
                self.references(form).to(float_type),
                self.offsets[form].to(position_dtype or float_type),
                self.logits.to(score_dtype or float_type),
            )
        return (value, self.locations.to(float_type), self.weights.to(score_dtype or float_type))


def run(function, inputs: Inputs, arguments, shapes=None):
    """Output, and gradients of all tensors."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in arguments]
    output = function(leaves[0], shapes or inputs.shapes, *leaves[1:])
    gradients = torch.autograd.grad(output, leaves, inputs.grad_output.to(output.dtype))
    return output.detach(), *gradients


def functions(kernel, form: str):
    name = "ms_deform_attn" if form == "plain" else "fused_ms_deform_attn"
    return getattr(kernel, name), getattr(kernel.reference, name)


def assert_close(results, expected, dtype):
    for result, right in zip(results, expected, strict=True):
        scale = right.abs().max().clamp(min=1)
        error = (result.double() - right.double()).abs().max() / scale
        assert error <= TOLERANCES[dtype], f"{tuple(right.shape)}: {error:.2e}"


@pytest.fixture(params=["plain", "points", "boxes"])
def form(request):
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients_are_those_of_float64(kernel, form, shapes, dtype):
    compiled, plain = functions(kernel, form)
    inputs = Inputs(shapes)
    inputs.value, inputs.grad_output = inputs.value.to(dtype).double(), inputs.grad_output.to(dtype).double()
    expected = run(plain, inputs, inputs.arguments(form))
    assert_close(run(compiled, inputs, inputs.arguments(form, dtype)), expected, dtype)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 40, 64, 128])
@pytest.mark.parametrize("points", [1, 3, 8])
def test_any_head_size_and_number_of_points(kernel, form, head_dim, points):
    compiled, plain = functions(kernel, form)
    inputs = Inputs([(6, 5), (3, 3), (2, 4)], head_dim=head_dim, points=points, heads=3)
    expected = run(plain, inputs, inputs.arguments(form))
    assert_close(run(compiled, inputs, inputs.arguments(form, torch.float32)), expected, torch.float32)


@pytest.mark.parametrize("position_dtype", TOLERANCES)
@pytest.mark.parametrize("score_dtype", TOLERANCES)
@pytest.mark.parametrize("form", ["points", "boxes"])
def test_offsets_and_logits_of_any_type(kernel, form, position_dtype, score_dtype):
    compiled, plain = functions(kernel, form)
    inputs = Inputs([(6, 5), (3, 3)], points=3)
    offsets = inputs.offsets[form].to(position_dtype).double()
    inputs.logits = inputs.logits.to(score_dtype).double()
    # Where rounding took an offset to the border of a pixel, move it off again.
    steps = 1 / inputs.sizes if form == "points" else inputs.box_sizes[:, :, None, :, None] / 2 / inputs.points
    pixels = (inputs.reference[:, :, None, :, None] + offsets * steps) * inputs.sizes - 0.5
    border = (pixels - pixels.round()).abs() < 1e-3
    inputs.offsets[form] = torch.where(border, torch.full_like(offsets, 0.25), offsets)
    expected = run(plain, inputs, inputs.arguments(form))
    arguments = inputs.arguments(form, torch.float32, position_dtype, score_dtype)
    results = run(compiled, inputs, arguments)
    assert [result.dtype for result in results[3:]] == [position_dtype, score_dtype]
    for result, right, dtype in zip(
        results, expected, [torch.float32, torch.float32, position_dtype, position_dtype, score_dtype], strict=True
    ):
        assert_close([result], [right], dtype)


@pytest.mark.parametrize("queries", [1, 39, 100])  # of 39 tokens
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("per_level", [False, True])
@pytest.mark.parametrize("form", ["points", "boxes"])
def test_references_broadcast(kernel, form, images, per_level, queries):
    compiled, plain = functions(kernel, form)
    inputs = Inputs([(6, 5), (3, 3)], per_level=per_level, queries=queries)
    inputs.reference, inputs.box_sizes = inputs.reference[:images], inputs.box_sizes[:images]
    inputs.measure_offsets()
    expected = run(plain, inputs, inputs.arguments(form))
    assert_close(run(compiled, inputs, inputs.arguments(form, torch.float32)), expected, torch.float32)


def test_a_box_without_a_size_has_a_gradient(kernel):
    """All of its samples are at its centre; how they move when the box grows is known all the same."""
    compiled, plain = functions(kernel, "boxes")
    inputs = Inputs([(6, 5), (3, 3)])
    inputs.box_sizes.zero_()
    inputs.offsets["boxes"] = torch.randn(inputs.locations.shape, generator=torch.Generator().manual_seed(0)).double()
    expected = run(plain, inputs, inputs.arguments("boxes"))
    assert expected[2][..., 2:].abs().min() > 0
    assert_close(run(compiled, inputs, inputs.arguments("boxes", torch.float32)), expected, torch.float32)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -1e38])
def test_boxes_whose_size_is_not_finite_sample_nothing(kernel, odd):
    inputs = Inputs([(6, 5), (3, 3)], queries=6)
    value, boxes, offsets, logits = inputs.arguments("boxes", torch.float32)
    odd_boxes, nowhere = boxes.clone(), offsets.clone()
    odd_boxes[:, 1, :, 2], odd_boxes[:, 2, :, 3], nowhere[:, 1:3] = odd, odd, float("nan")
    results = []
    for references, positions in ((boxes, nowhere), (odd_boxes, offsets)):
        leaves = [tensor.clone().requires_grad_() for tensor in (value, positions, logits)]
        output = kernel.fused_ms_deform_attn(leaves[0], inputs.shapes, references, *leaves[1:])
        results.append((output, *torch.autograd.grad(output, leaves, inputs.grad_output.float())))
    assert all(tensor.isfinite().all() for tensor in results[1])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


def test_locations_that_are_not_numbers_are_outside(kernel, form):
    compiled, plain = functions(kernel, form)
    inputs = Inputs([(6, 5), (3, 3)], queries=6)
    positions = inputs.locations if form == "plain" else inputs.offsets[form]
    for query, number in enumerate((float("nan"), float("inf"), float("-inf"), 1e38)):
        positions[:, query, :, 0, 1] = number
        positions[:, query, :, 1, 0, 1] = number
    expected = run(plain, inputs, inputs.arguments(form))
    assert all(tensor.isfinite().all() for tensor in expected)
    assert_close(run(compiled, inputs, inputs.arguments(form, torch.float32)), expected, torch.float32)


def test_values_outside_do_not_leak(kernel):
    """A sample outside its map multiplies nothing, not even an infinite value at the border, by zero."""
    value = torch.full((1, 4, 1, 8), float("inf"))
    output = kernel.ms_deform_attn(value, [(2, 2)], torch.full((1, 1, 1, 1, 1, 2), -3.0), torch.ones(1, 1, 1, 1, 1))
    assert torch.equal(output, torch.zeros(1, 1, 8))


def test_extreme_logits(kernel):
    compiled, plain = functions(kernel, "points")
    inputs = Inputs([(6, 5), (3, 3)], queries=4)
    inputs.logits[:, 0] *= 1e4
    inputs.logits[:, 1] -= 1e4
    inputs.logits[:, 2, :, 1:] = float("-inf")
    inputs.logits = inputs.logits.float().double()
    expected = run(plain, inputs, inputs.arguments("points"))
    assert_close(run(compiled, inputs, inputs.arguments("points", torch.float32)), expected, torch.float32)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_logits_that_make_no_softmax_show_in_the_result(kernel, odd):
    compiled, plain = functions(kernel, "points")
    inputs = Inputs([(6, 5), (3, 3)], queries=4)
    inputs.logits[:, 2, 1, 3] = odd
    for function in (compiled, plain):
        output, grad_value, *_ = run(function, inputs, inputs.arguments("points", torch.float32))
        wrong = output.isnan().any(-1)
        assert wrong[:, 2].all() and wrong.sum() == len(output)
        assert grad_value.isnan().any()


@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_do(kernel, form, batch, queries):
    compiled, _ = functions(kernel, form)
    inputs = Inputs([(2, 3), (1, 1)], batch=batch, queries=queries)
    arguments = inputs.arguments(form, torch.float32)
    output, *gradients = run(compiled, inputs, arguments)
    assert output.shape == (batch, queries, 64)
    for gradient, tensor in zip(gradients, arguments, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_views(kernel, form):
    """A value that is part of something larger, and everything else in another order of memory."""
    compiled, _ = functions(kernel, form)
    inputs = Inputs([(6, 5), (3, 3)], heads=2, head_dim=16)
    arguments = inputs.arguments(form, torch.float32)
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


def test_expanded_gradient(kernel, form):
    """`output.sum()` hands down a gradient whose strides are all 0."""
    compiled, plain = functions(kernel, form)
    inputs = Inputs([(6, 5), (3, 3)])
    gradients = []
    for function, dtype in ((compiled, torch.float32), (plain, torch.float64)):
        leaves = [tensor.requires_grad_() for tensor in inputs.arguments(form, dtype)]
        function(leaves[0], inputs.shapes, *leaves[1:]).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert_close(*gradients, torch.float32)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("batch", "heads"), [(1, 2), (2, 3)])
def test_threads(kernel, form, threads, batch, heads):
    """Few heads for the threads, or a number that they cannot share evenly; twice the same to the last bit."""
    compiled, plain = functions(kernel, form)
    inputs = Inputs([(4, 5), (2, 2)], batch=batch, heads=heads, queries=500)
    expected = run(plain, inputs, inputs.arguments(form))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = run(compiled, inputs, inputs.arguments(form, torch.float32))
        second = run(compiled, inputs, inputs.arguments(form, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert_close(first, expected, torch.float32)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_other_head_sizes_and_types_take_the_pytorch_path(kernel, form):
    compiled, plain = functions(kernel, form)
    for head_dim, dtype in ((12, torch.float32), (8, torch.float64)):
        inputs = Inputs([(6, 5), (3, 3)], head_dim=head_dim)
        arguments = inputs.arguments(form, dtype)
        result, expected = (function(arguments[0], inputs.shapes, *arguments[1:]) for function in (compiled, plain))
        assert torch.equal(result, expected)


def test_gradcheck_of_the_plain_path(kernel, form):
    """What the gradients above are compared with is itself right."""
    _, plain = functions(kernel, form)
    inputs = Inputs([(3, 4), (2, 2)], batch=1, queries=3, heads=1, head_dim=2, points=2)
    leaves = [tensor.requires_grad_() for tensor in inputs.arguments(form)]
    assert torch.autograd.gradcheck(lambda value, *others: plain(value, inputs.shapes, *others), leaves)


def test_opcheck(kernel, form):
    inputs = Inputs([(6, 5), (3, 3)], head_dim=16)
    ops = kernel.operators.ops
    forward = ops.ms_deform_attn_forward if form == "plain" else ops.fused_ms_deform_attn_forward
    backward = ops.ms_deform_attn_backward if form == "plain" else ops.fused_ms_deform_attn_backward
    value, *others = inputs.arguments(form, torch.float32)
    flat = kernel.operators.flat(inputs.shapes)
    leaves = [tensor.clone().requires_grad_() for tensor in (value, *others)]
    torch.library.opcheck(forward.default, (leaves[0], flat, *leaves[1:]))
    torch.library.opcheck(backward.default, (inputs.grad_output.float(), value, flat, *others, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(kernel, form, dynamic):
    compiled, _ = functions(kernel, form)
    layers = kernel.layers
    layer = (layers.MultiScaleDeformableAttention if form == "plain" else layers.FusedMultiScaleDeformableAttention)()
    for seed, queries in enumerate((20, 33)):
        inputs = Inputs([(6, 5), (3, 3)], queries=queries, seed=seed)
        sizes = torch.tensor(inputs.shapes)
        starts = torch.tensor([0, 30])
        arguments = inputs.arguments(form, torch.float32)

        def through_layer(value, shapes, *others, sizes=sizes, starts=starts):
            rest = (64,) if form == "plain" else ()
            return layer(value * 2, sizes, shapes, starts, *others, *rest) + 1

        def direct(value, shapes, *others):
            return compiled(value * 2, shapes, *others) + 1

        torch._dynamo.reset()
        traced = torch.compile(through_layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for result, right in zip(run(traced, inputs, arguments), run(direct, inputs, arguments), strict=True):
            torch.testing.assert_close(result, right)


def test_autocast_keeps_locations_in_float32(kernel):
    compiled, plain = functions(kernel, "points")
    inputs = Inputs([(100, 168)], head_dim=16, points=2)
    value, reference, offsets, logits = inputs.arguments("points", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = compiled(value.bfloat16(), inputs.shapes, reference, offsets.bfloat16().float(), logits.bfloat16())
        locations = inputs.locations.float()
        same = kernel.ms_deform_attn(value.bfloat16(), inputs.shapes, locations, inputs.weights.bfloat16())
    assert output.dtype == same.dtype == torch.bfloat16
    expected = plain(inputs.value.bfloat16().double(), inputs.shapes, *inputs.arguments("points")[1:])
    assert_close([same], [expected], torch.bfloat16)


def test_second_derivative_is_refused(kernel, form):
    compiled, _ = functions(kernel, form)
    inputs = Inputs([(2, 3)])
    leaves = [tensor.requires_grad_() for tensor in inputs.arguments(form, torch.float32)]
    output = compiled(leaves[0], inputs.shapes, *leaves[1:])
    (gradient,) = torch.autograd.grad(output.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_deterministic_algorithms(kernel, form):
    compiled, _ = functions(kernel, form)
    inputs = Inputs([(6, 5), (3, 3)])
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(compiled, inputs, inputs.arguments(form, torch.float32)) for _ in range(2))
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
def test_bad_arguments_are_named(kernel, form, case):
    compiled, _ = functions(kernel, form)
    inputs = Inputs([(6, 5), (3, 3)])
    value, *middle, scores = inputs.arguments(form, torch.float32)
    arguments = {"value": value, "shapes": inputs.shapes, "scores": scores}
    change, message = BAD_ARGUMENTS[case]
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        compiled(arguments["value"], arguments["shapes"], *middle, arguments["scores"])


@pytest.mark.parametrize("shape", [(2, 37, 1, 3), (2, 37, 3, 2), (3, 37, 1, 2), (2, 37, 2)])
def test_bad_references_are_named(kernel, shape):
    inputs = Inputs([(6, 5), (3, 3)])
    value, _, *others = inputs.arguments("points", torch.float32)
    with pytest.raises(RuntimeError, match=r"1 or levels, 2 or 4\), have the shape"):
        kernel.fused_ms_deform_attn(value, inputs.shapes, torch.zeros(shape), *others)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_older_processors(variant, capability):
    """The same tests in the code that older processors run."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("runs inside itself")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "float64 or head_size or any_type or not_numbers or not_finite or extreme"]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
