"""Check and time the compiled kernel on a GPU, in one go and without a test runner.

    python kernels/ms_deform_attn/build.py
    python kernels/ms_deform_attn/tests/check_cuda.py --output check_cuda.json
    compute-sanitizer --tool memcheck python kernels/ms_deform_attn/tests/check_cuda.py --no-timing
    compute-sanitizer --tool racecheck python kernels/ms_deform_attn/tests/check_cuda.py --no-timing

Correctness: both forms, forward, backward and deterministic backward, against grid_sample in float64 over types and
sizes. Timing: the encoder of a 800 x 1344 image (3 levels, 22,050 queries, 8 heads of 32 channels, 4 points), against
PyTorch's grid_sample path, against a plain kernel of one thread per output number (how the kernels most models use
work), and against the times below which no kernel can go (see ms_deform_attn_cuda/README.md).

`--device cpu --no-timing` checks the CPU code with the same cases. Exit status 1 if anything is wrong.
"""

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn


ROOT = Path(__file__).resolve().parent.parent
ENCODER_SHAPES = [(25, 42), (50, 84), (100, 168)]  # 1/32, 1/16 and 1/8 of 800 x 1344
TILE = 4  # a block of the kernel takes 4 x 4 queries
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# One thread per output number, one read per corner and channel: what most models' kernels do, in float32.
PLAIN_KERNEL = """
extern "C" __global__ void plain(const float* value, const int* shapes, const float* locations, const float* weights,
                                 float* output, int total, int tokens, int queries, int heads, int channels, int levels,
                                 int points) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < total; i += gridDim.x * blockDim.x) {
    const int channel = i % channels, head = i / channels % heads, image = i / channels / heads / queries;
    const float* map = value + ((long long)image * tokens * heads + head) * channels + channel;
    const long long first = (long long)(i / channels) * levels * points;
    const int stride = heads * channels;
    float sum = 0;
    for (int level = 0; level < levels; ++level) {
      const int height = shapes[2 * level], width = shapes[2 * level + 1];
      for (int point = 0; point < points; ++point) {
        const long long sample = first + level * points + point;
        const float x = locations[2 * sample] * width - 0.5f, y = locations[2 * sample + 1] * height - 0.5f;
        if (x > -1 && y > -1 && x < width && y < height) {
          const int left = floorf(x), top = floorf(y);
          const float right_share = x - left, bottom_share = y - top;
          float sampled = 0;
          for (int corner = 0; corner < 4; ++corner) {
            const int column = left + corner % 2, row = top + corner / 2;
            if (column >= 0 && row >= 0 && column < width && row < height) {
              sampled += map[(long long)(row * width + column) * stride] *
                         (corner % 2 ? right_share : 1 - right_share) * (corner / 2 ? bottom_share : 1 - bottom_share);
            }
          }
          sum += sampled * weights[sample];
        }
      }
      map += (long long)height * width * stride;
    }
    output[i] = sum;
  }
}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--build", type=Path, default=ROOT / "build", help="folder of the variants (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--no-timing", action="store_true", help="correctness only")
    parser.add_argument("--spread", type=float, default=1.0, help="of the offsets around their ring, in pixels")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("check_cuda.py: no GPU here; --device cpu --no-timing checks the CPU code")
    ops = load_ops(arguments.build)

    failures = check(ops, arguments.device)
    if not arguments.no_timing:
        results = time_encoder(ops, arguments.spread)
        if arguments.output:
            arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    if failures:
        sys.exit(f"check_cuda.py: {failures} wrong")


def load_ops(build: Path):
    """The operators of the variant for this torch."""
    version = "torch" + "".join(torch.__version__.split(".")[:2]) + "-"
    variants = sorted(path for path in build.glob(f"{version}*") if (path / "_ops.py").exists())
    if not variants:
        sys.exit(f"check_cuda.py: nothing for this torch in {build}: run {ROOT / 'build.py'} first")
    print(f"torch {torch.__version__}, {variants[-1]}")
    spec = importlib.util.spec_from_file_location(
        "checked_kernel", variants[-1] / "__init__.py", submodule_search_locations=[str(variants[-1])]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["checked_kernel"] = package
    spec.loader.exec_module(package)
    return importlib.import_module("checked_kernel._ops").ops


# ---- Inputs and twins ------------------------------------------------------------------------------------------------


class Inputs:
    """Random inputs of the fused forms; `locations` and `weights` are what the plain form takes in their place.

    Args:
        shapes: (height, width) of the levels.
        queries: None for one per token, with the token's centre as its reference point.
        boxes: references are boxes around these points, and offsets in their units.
        spread: standard deviation of the offsets around the ring that a new model starts with, in pixels.
    """

    def __init__(
        self, shapes, device, *, batch=2, queries=None, heads=8, head_dim=32, points=4, dtype=torch.float32,
        input_dtype=None, per_image=False, per_level=False, boxes=False, spread=2.0, seed=0,
    ):  # fmt: skip
        random = torch.Generator(device).manual_seed(seed)
        options = {"device": device, "generator": random}
        input_dtype = dtype if input_dtype is None else input_dtype
        levels, tokens = len(shapes), sum(height * width for height, width in shapes)
        images, levels_of_reference = batch if per_image else 1, levels if per_level else 1
        if queries is None:
            queries = tokens
            self.reference = torch.cat([centres(height, width, device) for height, width in shapes])[None, :, None]
            self.reference = self.reference.repeat(images, 1, levels_of_reference, 1)
        else:
            self.reference = torch.rand((images, queries, levels_of_reference, 2), **options)
        angles = torch.arange(heads, device=device) * (2 * math.pi / heads)
        ring = torch.stack((angles.cos(), angles.sin()), -1)
        ring = (ring / ring.abs().amax(-1, keepdim=True))[:, None, None] * torch.arange(1, points + 1, device=device)[
            :, None
        ]

        if boxes:
            self.reference = torch.cat((self.reference, torch.rand(self.reference.shape, **options)), dim=-1)

        self.shapes, self.device, self.points = shapes, device, points
        self.flat_shapes = [size for shape in shapes for size in shape]
        self.sizes = torch.tensor([(width, height) for height, width in shapes], device=device, dtype=torch.float32)
        self.value = torch.randn((batch, tokens, heads, head_dim), **options).to(dtype)
        noise = torch.randn((batch, queries, heads, levels, points, 2), **options)
        self.offsets = (ring + spread * noise).to(input_dtype)
        self.logits = (2 * torch.randn((batch, queries, heads, levels * points), **options)).to(input_dtype)
        self.grad_output = torch.randn((batch, queries, heads * head_dim), **options).to(dtype)

    def fused(self):
        return self.value, self.flat_shapes, self.reference, self.offsets, self.logits

    def locations(self, offsets):
        """Where these offsets lead, in their type."""
        references = self.reference.to(offsets.dtype)[:, :, None, :, None]
        if references.shape[-1] == 2:
            return references + offsets / self.sizes.to(offsets.dtype)[:, None]
        return references[..., :2] + offsets / self.points * references[..., 2:] / 2

    def plain(self):
        locations = self.locations(self.offsets.float())
        weights = self.logits.float().softmax(-1).view(self.offsets.shape[:-1])
        return self.value, self.flat_shapes, locations, weights


def centres(height, width, device):
    """(height * width, 2), the (x, y) of pixel centres in the unit square."""
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).flatten(0, 1)


def grid_sample_path(value, shapes, locations, weights):
    """The plain form in PyTorch, in the type of the locations."""
    batch, _, heads = locations.shape[:3]
    dtype = locations.dtype
    output = 0
    for level, level_map in enumerate(value.split([height * width for height, width in shapes], dim=1)):
        # (batch, height * width, heads, head_dim) -> (batch * heads, head_dim, height, width)
        level_map = level_map.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, shapes[level])
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1  # (batch * heads, queries, points, 2)
        level_weights = weights[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)
        sampled = nn.functional.grid_sample(level_map.to(dtype), grid, align_corners=False)
        output = output + (sampled * level_weights).sum(-1)  # (batch * heads, head_dim, queries)
    return output.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


def twin(inputs, fused):
    """Output and gradients of one form in float64."""
    if fused:
        leaves = [leaf.double().requires_grad_() for leaf in (inputs.value, inputs.offsets, inputs.logits)]
        value, offsets, logits = leaves
        locations = inputs.locations(offsets)
        weights = logits.softmax(-1).view(offsets.shape[:-1])
    else:
        _, _, locations, weights = inputs.plain()
        leaves = [leaf.double().requires_grad_() for leaf in (inputs.value, locations, weights)]
        value, locations, weights = leaves
    output = grid_sample_path(value, inputs.shapes, locations, weights)
    output.backward(inputs.grad_output.double())
    return output.detach(), *[leaf.grad for leaf in leaves]


# ---- Correctness -----------------------------------------------------------------------------------------------------

CASES = {
    "encoder": {"shapes": [(5, 8), (10, 16), (20, 32)]},
    "one level": {"shapes": [(7, 9)], "heads": 4},
    "four levels": {"shapes": [(1, 1), (1, 6), (6, 1), (13, 11)], "heads": 3, "points": 5},
    "eight levels": {
        "shapes": [(2, 2), (1, 3), (3, 1), (2, 3), (3, 2), (4, 1), (1, 4), (9, 5)],
        "heads": 2,
        "points": 2,
    },
    "decoder": {"shapes": [(5, 8), (10, 16)], "queries": 100, "per_image": True, "per_level": True},
    "decoder of boxes": {
        "shapes": [(5, 8), (10, 16)],
        "queries": 100,
        "per_image": True,
        "per_level": True,
        "boxes": True,
    },
    "boxes of tokens": {"shapes": [(5, 8), (10, 16)], "boxes": True, "points": 3},
    "one query": {"shapes": [(4, 5)], "queries": 1, "batch": 1, "heads": 1},
    **{
        f"head size {size}": {"shapes": [(3, 4), (6, 8)], "head_dim": size, "heads": 2}
        for size in (8, 24, 64, 136, 328)
    },
    "many images": {"shapes": [(2, 3)], "batch": 300, "heads": 2, "head_dim": 8},
}


def check(ops, device) -> int:
    """Every case in every type; returns how many comparisons failed."""
    failures = comparisons = 0
    for name, case in CASES.items():
        for dtype in TOLERANCES:
            for input_dtype in {dtype, torch.float32}:
                inputs = Inputs(device=device, dtype=dtype, input_dtype=input_dtype, **case)
                for form in ("fused", "plain"):
                    wrong = compare(ops, inputs, form)
                    comparisons += 7
                    failures += len(wrong)
                    for what in wrong:
                        print(f"WRONG {name}, {form}, {dtype}, inputs {input_dtype}: {what}")
    for what in check_oddities(ops, device):
        failures += 1
        print(f"WRONG {what}")
    print(f"{comparisons - failures} of {comparisons} comparisons hold")
    return failures


def functions(ops, inputs, form):
    """Forward and backward of one form as functions of no argument and of `deterministic`."""
    if form == "fused":
        arguments = inputs.fused()
        forward, backward = ops.fused_ms_deform_attn_forward, ops.fused_ms_deform_attn_backward
    else:
        arguments = inputs.plain()
        forward, backward = ops.ms_deform_attn_forward, ops.ms_deform_attn_backward
    return lambda: forward(*arguments), lambda deterministic: backward(inputs.grad_output, *arguments, deterministic)


def compare(ops, inputs, form):
    """What differs from the float64 twin, as text."""
    forward, backward = functions(ops, inputs, form)
    output, *gradients = twin(inputs, form == "fused")
    names = ["grad value", "grad positions", "grad scores"]
    found = [("output", forward(), output)]
    for deterministic in (False, True):
        prefix = "deterministic " if deterministic else ""
        found += [(prefix + name, *pair) for name, *pair in zip(names, backward(deterministic), gradients, strict=True)]
    # Where a sample lies on a pixel's centre its slope jumps, and rounding decides which one counts.
    pixels = inputs.plain()[2] * inputs.sizes[:, None] - 0.5
    smooth = ((pixels - pixels.round()).abs() > 1e-3).all(-1, keepdim=True)
    wrong = []
    for name, actual, expected in found:
        if name.endswith("positions"):
            actual, expected = actual * smooth, expected * smooth
        tolerance = TOLERANCES[actual.dtype]
        # A gradient of a location sums over channels: its rounding goes with the largest one.
        limit = tolerance * expected.abs() + tolerance * min(max(expected.abs().max().item(), 1.0), 20.0)
        excess = ((actual.double() - expected).abs() / limit).max().item() if expected.numel() else 0.0
        if not excess <= 1 or actual.shape != expected.shape:  # NaN must not pass
            wrong.append(f"{name} is {excess:.2f} times the tolerance off")
    return wrong


def check_oddities(ops, device):
    """Locations that are no numbers, strided values, empty batches, order of additions."""
    inputs = Inputs([(5, 8), (10, 16)], device)
    value, shapes, locations, weights = inputs.plain()
    odd = locations.clone()
    odd[:, ::3, :, :, 0] = float("nan")
    odd[:, 1::3, :, :, 1, 0] = float("inf")
    odd[:, 2::3, :, :, 2, 1] = -3e38
    far = torch.where(torch.isfinite(odd) & (odd.abs() < 1e30), odd, torch.full_like(odd, -1e4))
    if not torch.equal(
        ops.ms_deform_attn_forward(value, shapes, odd, weights), ops.ms_deform_attn_forward(value, shapes, far, weights)
    ):
        yield "a location that is no number samples something"
    grads = ops.ms_deform_attn_backward(inputs.grad_output, value, shapes, odd, weights, True)
    if not all(grad.isfinite().all() for grad in grads):
        yield "a location that is no number gives a gradient that is none"

    wide = torch.full((2, 200 + 3, 8 + 1, 96), float("nan"), device=device)
    wide[:, :200, :8, 32:64] = value
    strided = wide[:, :200, :8, 32:64]
    if not torch.equal(
        ops.ms_deform_attn_forward(strided, shapes, locations, weights),
        ops.ms_deform_attn_forward(value, shapes, locations, weights),
    ):
        yield "a strided value gives another result"

    for batch, queries in ((0, 5), (2, 0)):
        rows = (slice(batch), slice(queries))
        empty = ops.ms_deform_attn_forward(value[:batch], shapes, locations[rows], weights[rows])
        if empty.shape != (batch, queries, 256):
            yield f"an empty input gives the shape {tuple(empty.shape)}"

    crowd = Inputs([(2, 3)], device, batch=1, queries=5000, head_dim=8)
    runs = [ops.fused_ms_deform_attn_backward(crowd.grad_output, *crowd.fused(), True)[0] for _ in range(5)]
    if not all(torch.equal(runs[0], run) for run in runs[1:]):
        yield "the deterministic backward differs from run to run"
    crowd.logits[:, :, 3] = float("nan")  # of many queries: some of their samples touch a pixel
    if not ops.fused_ms_deform_attn_backward(crowd.grad_output, *crowd.fused(), True)[0].isnan().any():
        yield "logits that are no numbers leave no trace in the deterministic gradient of the value"

    if device == "cuda":
        one = torch.zeros(1, device=device)
        value, shapes = one.expand(1, 1, 1, 8), [1, 1]
        positions, weights = one.expand(1, 2**30, 1, 1, 1, 2), one.expand(1, 2**30, 1, 1, 1)
        try:
            ops.ms_deform_attn_forward(value, shapes, positions, weights)
            yield "more queries than can be counted are not refused"
        except RuntimeError:
            pass


# ---- Timing ----------------------------------------------------------------------------------------------------------


def time_encoder(ops, spread) -> dict:
    """Prints and returns milliseconds of every variant, and the bounds."""
    properties = torch.cuda.get_device_properties(0)
    gpu = {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "clock_hz": clock_hz(),
        "dram_bytes_per_second": copy_speed(1 << 30),
        "l2_bytes_per_second": copy_speed(min(8 << 20, properties.L2_cache_size // 4)),
    }
    print(json.dumps(gpu))
    rows = []
    for batch in (1, 8):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            rows.append(time_one(ops, gpu, batch, dtype, spread))
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + " --- |" * len(names))
    for row in rows:
        print(
            "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()) + " |"
        )
    return {"torch": torch.__version__, "gpu": gpu, "spread": spread, "rows": rows}


def time_one(ops, gpu, batch, dtype, spread) -> dict:
    inputs = Inputs(ENCODER_SHAPES, "cuda", batch=batch, dtype=dtype, spread=spread)
    forward, backward = functions(ops, inputs, "fused")
    plain_forward, plain_backward = functions(ops, inputs, "plain")
    row = {"batch": batch, "type": str(dtype).removeprefix("torch.")}
    row["fused ms"] = milliseconds(forward)
    row |= bounds(inputs, gpu)
    bound = max(value for name, value in row.items() if name.endswith("bound ms"))
    row["share of the largest bound"] = bound / row["fused ms"]
    row["plain form ms"] = milliseconds(plain_forward)
    row["with softmax and locations ms"] = milliseconds(lambda: ops.ms_deform_attn_forward(*inputs.plain()))

    def grid_sample_forward():
        value, _, locations, weights = inputs.plain()
        return grid_sample_path(value, inputs.shapes, locations, weights).to(dtype)

    row["grid_sample ms"] = milliseconds(grid_sample_forward)
    row["one thread per number ms"] = time_plain_kernel(inputs)
    row["backward ms"] = milliseconds(lambda: backward(False))
    row["deterministic backward ms"] = milliseconds(lambda: backward(True))
    row["plain form backward ms"] = milliseconds(lambda: plain_backward(False))
    row["grid_sample forward + backward ms"] = milliseconds(lambda: grid_sample_backward(inputs))
    return row


def grid_sample_backward(inputs):
    leaves = [leaf.detach().requires_grad_() for leaf in (inputs.value, inputs.offsets, inputs.logits)]
    value, offsets, logits = leaves
    locations = inputs.locations(offsets.float())
    weights = logits.float().softmax(-1).view(offsets.shape[:-1])
    grid_sample_path(value, inputs.shapes, locations, weights).to(value.dtype).backward(inputs.grad_output)


def bounds(inputs, gpu) -> dict:
    """Times below which the fused forward cannot go, in milliseconds, by what it must move at each level of memory."""
    value, _, reference, offsets, logits = inputs.fused()
    element = value.element_size()
    output = inputs.grad_output.numel() * element
    once = sum(tensor.numel() * tensor.element_size() for tensor in (value, reference, offsets, logits)) + output
    corners, distinct = count_corners(inputs)
    row = value.shape[-1] * element
    l1 = gpu["multiprocessors"] * 128 * gpu["clock_hz"]
    return {
        "DRAM bound ms": 1e3 * once / gpu["dram_bytes_per_second"],
        "L2 bound ms": 1e3 * (distinct * row + once - value.numel() * element) / gpu["l2_bytes_per_second"],
        "L1 bound ms": 1e3 * corners * row / l1,
    }


def count_corners(inputs) -> tuple[int, int]:
    """Corners read by all samples, and how many of them differ within a block's tile of queries, heads apart."""
    value, _, locations, _ = inputs.plain()
    tiles, first_tile = [], 0
    for height, width in inputs.shapes:
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        across = -(-width // TILE)
        tiles.append((y // TILE * across + x // TILE).flatten() + first_tile)
        first_tile += across * -(-height // TILE)
    tiles = torch.cat(tiles).to(inputs.device)
    corners = distinct = 0
    for head in range(value.shape[2]):  # image 0 stands for all
        keys, first_token = [], 0
        for level, (height, width) in enumerate(inputs.shapes):
            position = locations[0, :, head, level] * inputs.sizes[level] - 0.5  # (queries, points, 2)
            for corner in range(4):
                x = position[..., 0].floor() + corner % 2
                y = position[..., 1].floor() + corner // 2
                inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
                token = first_token + y.long() * width + x.long()
                keys.append((tiles[:, None] * value.shape[1] + token)[inside])
            first_token += height * width
        keys = torch.cat(keys)
        corners += len(keys)
        distinct += len(keys.unique())
    return corners * value.shape[0], distinct * value.shape[0]


def time_plain_kernel(inputs) -> float | None:
    """Milliseconds of softmax, locations and PLAIN_KERNEL in float32, or None where torch cannot compile it."""
    if not hasattr(torch.cuda, "_compile_kernel"):
        return None
    kernel = torch.cuda._compile_kernel(PLAIN_KERNEL, "plain")
    value = inputs.value.float()
    shapes = torch.tensor(inputs.flat_shapes, dtype=torch.int32, device=inputs.device)
    batch, tokens, heads, channels = value.shape
    queries, levels, points = inputs.offsets.shape[1], *inputs.offsets.shape[3:5]
    output = torch.empty((batch, queries, heads * channels), device=inputs.device)

    def run():
        _, _, locations, weights = inputs.plain()
        sizes = [output.numel(), tokens, queries, heads, channels, levels, points]
        arguments = [value, shapes, locations, weights.contiguous(), output, *sizes]
        kernel(grid=(-(-output.numel() // 256), 1, 1), block=(256, 1, 1), args=arguments)

    run()
    expected = grid_sample_path(value, inputs.shapes, *inputs.plain()[2:])
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    return milliseconds(run)


def milliseconds(function, repeats: int = 20) -> float:
    """Median over `repeats` of the time per call, calls queued until the clock is sure; caches stay warm."""
    function()
    torch.cuda.synchronize()
    calls, medians = 1, []
    while len(medians) < repeats:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)  # the host gets ahead, so that the GPU does not wait for it
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end)
        if elapsed < 2 and calls < 16:
            calls *= 2
        else:
            medians.append(elapsed / calls)
    return statistics.median(medians)


def copy_speed(size: int) -> float:
    """Bytes read and written a second by a copy of `size` bytes, which stays in L2 if it fits twice."""
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / (milliseconds(lambda: target.copy_(source)) / 1e3)


def clock_hz() -> float:
    """The multiprocessors' highest clock."""
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    return 1e6 * float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])


if __name__ == "__main__":
    main()
