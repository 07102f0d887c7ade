"""Time the compiled kernel against `grid_sample`, which models without a kernel use.

    python kernels/ms_deform_attn/benchmarks/benchmark.py --threads 1 --rounds 9

The first case is the encoder of a Mask2Former-style model on a 800 x 1344 image: maps of 1/32, 1/16 and 1/8, a query
for each pixel, 8 heads of 32 channels, 4 points. The second one is the decoder of a DINO-style model: 900 queries, with
a box in each map as references, attend to the same tokens. All contestants take turns in each round, so that what else
the machine does hits them alike; the table has medians, and the median of the ratios within a round.

`kernels benchmark` runs the classes.
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from pathlib import Path

import torch


try:
    from kernels.benchmark import Benchmark
except ImportError:
    Benchmark = object

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(25, 42), (50, 84), (100, 168)]
HEADS, HEAD_DIM, POINTS = 8, 32, 4
OFFSET_SPREAD = 2.0  # pixels, or units of a box
DECODER_QUERIES = 900
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Case:
    """One image's tokens attending to each other, or queries with boxes to them, in the type of the values."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", batch: int = 1, boxes: bool = False):
        generator = torch.Generator().manual_seed(0)
        tokens = sum(height * width for height, width in SHAPES)
        queries = DECODER_QUERIES if boxes else tokens

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(device)

        self.value = normal(batch, tokens, HEADS, HEAD_DIM).to(dtype)
        self.offsets = normal(batch, queries, HEADS, len(SHAPES), POINTS, 2) * OFFSET_SPREAD
        self.logits = normal(batch, queries, HEADS, len(SHAPES) * POINTS)
        self.grad_output = normal(batch, queries, HEADS * HEAD_DIM).to(dtype)
        if boxes:
            self.reference = torch.rand((batch, queries, len(SHAPES), 4), generator=generator).to(device)
        else:
            self.reference = torch.cat([pixel_centres(*shape) for shape in SHAPES])[None, :, None].to(device)

    def forward(self, function):
        return function(self.value, SHAPES, self.reference, self.offsets, self.logits)

    def forward_and_backward(self, function):
        leaves = [tensor.detach().requires_grad_() for tensor in (self.value, self.offsets, self.logits)]
        output = function(leaves[0], SHAPES, self.reference, *leaves[1:])
        return torch.autograd.grad(output, leaves, self.grad_output)


def pixel_centres(height: int, width: int) -> torch.Tensor:
    """(height * width, 2), (x, y) with 0 and 1 at the map's edges."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1)


class _EncoderBenchmark(Benchmark):
    seed = 0
    dtype = torch.float32

    def setup(self):
        self.case = Case(self.dtype, self.device)
        self.out = torch.empty_like(self.case.grad_output)

    def benchmark_encoder(self):
        self.out = self.case.forward(self.kernel.fused_ms_deform_attn)

    def verify_encoder(self) -> torch.Tensor:
        return self.case.forward(self.kernel.reference.fused_ms_deform_attn)


class Float32Benchmark(_EncoderBenchmark):
    dtype = torch.float32


class Bfloat16Benchmark(_EncoderBenchmark):
    dtype = torch.bfloat16


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", type=Path, default=ROOT, help="folder with build/ (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES))
    parser.add_argument("--json", type=Path, help="write all times there")
    arguments = parser.parse_args()
    import kernels

    torch.set_num_threads(arguments.threads)
    kernel = kernels.get_local_kernel(arguments.kernel.resolve())
    results = {}
    for name, part in itertools.product(arguments.types, ("encoder", "decoder")):
        case = Case(TYPES[name], arguments.device, arguments.batch, boxes=part == "decoder")
        results[f"{part}, {name}"] = {
            step: interleaved(
                {
                    "kernel": lambda run=run: run(kernel.fused_ms_deform_attn),
                    "grid_sample": lambda run=run: run(kernel.reference.fused_ms_deform_attn),
                },
                arguments.rounds,
                arguments.device,
            )
            for step, run in {"forward": case.forward, "forward + backward": case.forward_and_backward}.items()
        }
    capability = torch.backends.cpu.get_cpu_capability() if arguments.device == "cpu" else ""
    machine = f"{platform.machine()} {capability}, {arguments.threads} threads"
    print(f"torch {torch.__version__}, {machine}, batch {arguments.batch}")
    print("| case, values | step | grid_sample, ms | kernel, ms | ratio | ratio, lowest to highest |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, steps in results.items():
        for step, times in steps.items():
            ratios = [slow / fast for slow, fast in zip(times["grid_sample"], times["kernel"], strict=True)]
            slow, fast = (statistics.median(times[key]) for key in ("grid_sample", "kernel"))
            spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
            print(f"| {name} | {step} | {slow:.1f} | {fast:.1f} | {statistics.median(ratios):.1f} | {spread} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def interleaved(contestants: dict, rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each contestant in each round, after one round that does not count."""
    times = {name: [] for name in contestants}
    for round_number in range(rounds + 1):
        for name, function in contestants.items():
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.accelerator.synchronize()
            if round_number > 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


if __name__ == "__main__":
    main()
