"""The CUDA kernels' logic, run on the CPU lane by lane (see cuda_on_cpu.h), against grid_sample in float64.

Needs g++ only: `pytest kernels/ms_deform_attn/ms_deform_attn_cuda/simulation`. SIMULATION_FLAGS=-fsanitize=address with
LD_PRELOAD=$(g++ -print-file-name=libasan.so) and ASAN_OPTIONS=detect_leaks=0 checks every access of the kernels.
"""

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch


HERE = Path(__file__).parent
ELEMENT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FORMS = ["plain", "points", "boxes"]  # in the order of `Form` in problem.h
MULTIPROCESSORS = 4
pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the simulation needs Linux")


class Level(ctypes.Structure):
    _fields_ = [("height", ctypes.c_int), ("width", ctypes.c_int), ("first_token", ctypes.c_int)]


class Problem(ctypes.Structure):
    """`ms_deform_attn::cuda::Problem` of problem.h, field for field."""

    _fields_ = [
        ("batch", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("queries", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("head_dim", ctypes.c_int),
        ("levels", ctypes.c_int),
        ("points", ctypes.c_int),
        ("level", Level * 8),
        ("value_type", ctypes.c_int),
        ("value", ctypes.c_void_p),
        ("value_image_stride", ctypes.c_int64),
        ("value_head_stride", ctypes.c_int64),
        ("value_token_stride", ctypes.c_int),
        ("form", ctypes.c_int),
        ("reference_points", ctypes.c_void_p),
        ("reference_images", ctypes.c_int),
        ("reference_levels", ctypes.c_int),
        ("position_type", ctypes.c_int),
        ("positions", ctypes.c_void_p),
        ("score_type", ctypes.c_int),
        ("scores", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("grad_output", ctypes.c_void_p),
        ("grad_sums", ctypes.c_void_p),
        ("grad_positions", ctypes.c_void_p),
        ("grad_scores", ctypes.c_void_p),
        ("grad_weights", ctypes.c_void_p),
        ("grad_bound", ctypes.c_void_p),
        ("weight_bound", ctypes.c_void_p),
    ]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("simulation") / "simulation.so"
    flags = ["-std=c++17", "-O1", "-g", "-shared", "-fPIC", "-DMS_DEFORM_ATTN_SIMULATION", "-I", str(HERE.parent)]
    extra = shlex.split(os.environ.get("SIMULATION_FLAGS", ""))
    subprocess.run(["g++", *flags, *extra, str(HERE / "simulate.cpp"), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    assert library.problem_bytes() == ctypes.sizeof(Problem)
    return library


class Case:
    """Random inputs of one form, and what the simulated kernels and the float64 twin make of them.

    Args:
        shapes: (height, width) of the levels.
        form: "plain", with locations and weights; "points" or "boxes", with offsets from these references and logits.
        queries: None for one per token.
    """

    def __init__(
        self,
        shapes,
        form,
        *,
        batch=2,
        queries=None,
        heads=2,
        head_dim=32,
        points=4,
        dtype=torch.float32,
        input_dtype=torch.float32,
        reference_images=1,
        reference_levels=1,
        seed=0,
    ):
        random = torch.Generator().manual_seed(seed)

        def normal(*shape, dtype=torch.float32):
            return torch.randn(shape, generator=random).to(dtype)

        self.shapes, self.form, self.points = shapes, form, points
        tokens = sum(height * width for height, width in shapes)
        queries = tokens if queries is None else queries
        levels = len(shapes)
        self.value = normal(batch, tokens, heads, head_dim, dtype=dtype)
        self.grad_output = normal(batch, queries, heads, head_dim, dtype=dtype)
        if form != "plain":
            numbers = {"points": 2, "boxes": 4}[form]
            self.reference = torch.rand((reference_images, queries, reference_levels, numbers), generator=random)
            self.positions = 3 * normal(batch, queries, heads, levels, points, 2, dtype=input_dtype)
            self.scores = 2 * normal(batch, queries, heads, levels, points, dtype=input_dtype)
        else:
            self.reference = None
            self.positions = 1.4 * torch.rand((batch, queries, heads, levels, points, 2), generator=random) - 0.2
            self.scores = normal(batch, queries, heads, levels, points, dtype=input_dtype)

    def problem(self):
        batch, tokens, heads, head_dim = self.value.shape
        vector = 16 // self.value.element_size()
        strides = [stride // vector for stride in self.value.stride()]
        problem = Problem(
            batch=batch,
            tokens=tokens,
            queries=self.positions.shape[1],
            heads=heads,
            head_dim=head_dim,
            levels=len(self.shapes),
            points=self.points,
            value_type=ELEMENT_TYPES[self.value.dtype],
            value=self.value.data_ptr(),
            value_image_stride=strides[0],
            value_token_stride=strides[1],
            value_head_stride=strides[2],
            position_type=ELEMENT_TYPES[self.positions.dtype],
            positions=self.positions.data_ptr(),
            score_type=ELEMENT_TYPES[self.scores.dtype],
            scores=self.scores.data_ptr(),
        )
        first_token = 0
        for level, (height, width) in enumerate(self.shapes):
            problem.level[level] = Level(height, width, first_token)
            first_token += height * width
        problem.form = FORMS.index(self.form)
        if self.reference is not None:
            problem.reference_points = self.reference.data_ptr()
            problem.reference_images, problem.reference_levels = self.reference.shape[0], self.reference.shape[2]
        return problem

    def forward(self, library):
        output = torch.full_like(self.grad_output, float("nan"))
        problem = self.problem()
        problem.output = output.data_ptr()
        assert library.forward(ctypes.byref(problem), MULTIPROCESSORS) == 0
        return output

    def backward(self, library, deterministic):
        """Gradients of value, positions and scores."""
        shape = self.value.shape
        sums = torch.zeros(shape, dtype=torch.int64 if deterministic else torch.float32)
        grad_positions = torch.full_like(self.positions, float("nan"))
        grad_scores = torch.full_like(self.scores, float("nan"))
        grad_weights = torch.full(self.scores.shape, float("nan"))
        grad_bound, weight_bound = self.grad_output.abs().amax().float(), self.weight_bound()
        problem = self.problem()
        problem.grad_output = self.grad_output.data_ptr()
        problem.grad_sums = sums.data_ptr()
        problem.grad_positions = grad_positions.data_ptr()
        problem.grad_scores = grad_scores.data_ptr()
        problem.grad_weights = grad_weights.data_ptr()
        problem.grad_bound = grad_bound.data_ptr()
        problem.weight_bound = weight_bound.data_ptr()
        assert library.backward(ctypes.byref(problem), deterministic, MULTIPROCESSORS) == 0
        grad_value = torch.full(shape, float("nan"), dtype=self.value.dtype)
        finished = library.finish(ctypes.byref(problem), deterministic, ctypes.c_void_p(grad_value.data_ptr()))
        assert finished == (0 if deterministic or self.value.dtype != torch.float32 else -1)
        if finished == -1:  # the sums are the gradient
            grad_value = sums
        return grad_value, grad_positions, grad_scores

    def weight_bound(self):
        """As the operator makes it."""
        if self.form == "plain":
            return self.scores.abs().amax().float()
        largest = self.scores.flatten(-2).amax(-1)
        return (largest - largest).amax().float() + 1

    def twin(self):
        """Output and gradients in float64, through grid_sample."""
        leaves = [leaf.double().requires_grad_() for leaf in (self.value, self.positions, self.scores)]
        value, positions, scores = leaves
        batch, queries, heads = positions.shape[:3]
        head_dim = value.shape[-1]
        # what is not finite touches no pixel
        finite = torch.isfinite(positions).all(-1, keepdim=True)
        positions = torch.where(finite, positions, torch.full_like(positions, -1e4))
        sizes = torch.tensor([(width, height) for height, width in self.shapes], dtype=torch.float64)
        if self.form != "plain":
            references = self.reference.double()[:, :, None, :, None]
            steps = references[..., 2:] / 2 / self.points if self.form == "boxes" else 1 / sizes[:, None]
            positions = references[..., :2] + positions * steps
            scores = scores.flatten(-2).softmax(-1).view(scores.shape)
        output = torch.zeros(batch * heads, head_dim, queries, dtype=torch.float64)
        maps = value.split([height * width for height, width in self.shapes], dim=1)
        for level, (height, width) in enumerate(self.shapes):
            level_map = maps[level].permute(0, 2, 3, 1).reshape(batch * heads, head_dim, height, width)
            grid = 2 * positions[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
            weights = scores[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)
            sampled = torch.nn.functional.grid_sample(level_map, grid, align_corners=False)
            output = output + (sampled * weights).sum(-1)
        output = output.view(batch, heads, head_dim, queries).permute(0, 3, 1, 2)
        output.backward(self.grad_output.double())
        return output.detach(), *[leaf.grad for leaf in leaves]


def assert_close(actual, expected, dtype):
    """As close as rounding to `dtype`, and sums of a few hundred float32 numbers, allow."""
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    scale = max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * min(scale, 20.0))


def check(case, library):
    output, *gradients = case.twin()
    assert_close(case.forward(library), output, case.value.dtype)
    for deterministic in (False, True):
        for actual, expected in zip(case.backward(library, deterministic), gradients, strict=True):
            assert_close(actual, expected, actual.dtype)


SHAPES = {
    "one": [(5, 7)],
    "two": [(1, 1), (9, 4)],
    "three": [(3, 5), (6, 10), (12, 20)],
    "four": [(1, 6), (6, 1), (2, 3), (7, 5)],
    "eight": [(2, 2), (1, 3), (3, 1), (2, 3), (3, 2), (4, 1), (1, 4), (2, 5)],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_levels(library, shapes, form):
    check(Case(shapes, form), library)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 40, 64, 104, 136, 256, 328])
def test_head_sizes_and_types(library, head_dim, dtype, form):
    check(Case([(2, 3), (4, 5)], form, batch=1, queries=7, head_dim=head_dim, dtype=dtype), library)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [1, 3, 8, 40])
@pytest.mark.parametrize("points", [1, 2, 3, 5, 8, 11])
def test_heads_and_points(library, heads, points, form):
    check(Case([(2, 3), (4, 5)], form, batch=1, queries=5, heads=heads, points=points), library)


@pytest.mark.parametrize("input_dtype", ELEMENT_TYPES, ids=str)
@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_types_of_positions_and_scores(library, dtype, input_dtype):
    check(Case(SHAPES["three"], "points", heads=8, batch=1, dtype=dtype, input_dtype=input_dtype), library)


@pytest.mark.parametrize("reference_images", [1, 3])
@pytest.mark.parametrize("reference_levels", [1, 2])
@pytest.mark.parametrize("queries", [1, 100, None])
@pytest.mark.parametrize("form", ["points", "boxes"])
def test_references(library, form, reference_images, reference_levels, queries):
    options = {"reference_images": reference_images, "reference_levels": reference_levels}
    check(Case([(4, 6), (8, 12)], form, batch=3, queries=queries, head_dim=8, **options), library)


def test_strided_value(library):
    case = Case([(3, 4), (6, 8)], "points")
    expected = case.forward(library), *case.backward(library, True)
    value, poisoned = case.value, torch.full((2, 60 + 3, 2 + 1, 3 * 32), float("nan"))
    poisoned[:, :60, :2, 32:64] = value
    case.value = poisoned[:, :60, :2, 32:64]
    for actual, wanted in zip((case.forward(library), *case.backward(library, True)), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_positions_that_are_not_finite_sample_nothing(library, form):
    case = Case(SHAPES["three"], form)
    choice = torch.randint(0, 12, case.positions.shape, generator=torch.Generator().manual_seed(1))
    for index, odd in enumerate([float("nan"), float("inf"), -float("inf"), 3e38, -3e38]):
        case.positions[choice == index] = odd
    check(case, library)


def test_what_is_not_sampled_does_not_matter(library):
    """A value that is not a number stays with the queries that touch it."""
    case = Case([(4, 5)], "plain", queries=6, points=2)
    case.positions[:] = torch.tensor([2.7 / 5, 1.7 / 4])  # between pixels (1, 2), (1, 3), (2, 2), (2, 3)
    case.positions[:, 2:4] = torch.tensor([1.05, 0.5])  # beyond the right edge, near pixels (1, 4), (2, 4)
    case.positions[:, 4:] = 7.0
    expected = case.forward(library), *case.backward(library, False)
    assert all(tensor.isfinite().all() for tensor in expected)
    touched = torch.tensor([7, 8, 9, 12, 13, 14])
    untouched = torch.ones(20, dtype=torch.bool).index_fill(0, touched, False)
    case.value[:, untouched] = float("nan")
    for actual, wanted in zip((case.forward(library), *case.backward(library, False)), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_whole_pixels_and_edges(library):
    """Samples on pixel centres and on the border give what float64 gives."""
    case = Case([(4, 8)], "plain", batch=1, queries=24)
    x = torch.arange(-2, 10).repeat_interleave(2) / 8 + torch.tensor([0.0, 0.0625]).repeat(12)
    case.positions[..., 0] = x.view(1, 24, 1, 1, 1)
    case.positions[..., 1] = torch.tensor([-0.125, 0.0, 0.5, 1.125])
    assert_close(case.forward(library), case.twin()[0], torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_deterministic_backward_does_not_depend_on_the_order(library, form):
    case = Case([(2, 3)], form, batch=1, queries=300, head_dim=8)
    orders = {}
    for deterministic in (False, True):
        gradients = []
        for seed in (0, 1, 2):
            library.set_warp_order_seed(seed)
            gradients.append(case.backward(library, deterministic)[0])
        library.set_warp_order_seed(0)
        orders[deterministic] = all(torch.equal(gradients[0], other) for other in gradients[1:])
    assert orders == {False: False, True: True}


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 1e8, 1e30])
def test_deterministic_backward_at_any_scale(library, size):
    case = Case([(3, 4)], "points", batch=1, head_dim=8)
    case.grad_output *= size
    assert_close(case.backward(library, True)[0] / size, case.twin()[1] / size, torch.float32)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_deterministic_backward_shows_overflow(library, odd):
    case = Case([(3, 4)], "points", batch=1, head_dim=8)
    case.grad_output[0, 3, 1, 2] = odd
    assert case.backward(library, True)[0].isnan().any()


@pytest.mark.parametrize("form", ["points", "boxes"])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_deterministic_backward_shows_logits_that_make_no_weights(library, form, odd):
    case = Case([(3, 4)], form, batch=1, head_dim=8)
    case.scores[0, 3, 1] = odd  # of all points
    assert case.backward(library, True)[0].isnan().any()


def test_deterministic_backward_takes_points_that_are_masked_out(library):
    case = Case([(3, 4)], "points", batch=1, head_dim=8)
    case.scores[..., 1:] = -float("inf")
    check(case, library)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_boxes_whose_size_is_not_finite_sample_nothing(library, odd):
    case = Case([(3, 4), (5, 6)], "boxes", batch=1, reference_levels=2)
    case.reference[0, ::2, 0, 2] = odd
    without = Case([(3, 4), (5, 6)], "boxes", batch=1, reference_levels=2)
    without.positions[:, ::2, :, 0] = float("nan")
    assert torch.equal(case.forward(library), without.forward(library))
    for deterministic in (False, True):
        for actual, wanted in zip(
            case.backward(library, deterministic), without.backward(library, deterministic), strict=True
        ):
            assert torch.equal(actual, wanted)


def test_zero_gradient(library):
    case = Case([(3, 4)], "points", batch=1, head_dim=8)
    case.grad_output.zero_()
    assert all(not gradient.any() for gradient in case.backward(library, True))
