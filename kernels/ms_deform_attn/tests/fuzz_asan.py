"""Run the CPU code on random shapes under AddressSanitizer and UndefinedBehaviorSanitizer.

    python kernels/ms_deform_attn/tests/fuzz_asan.py --seconds 60

builds the kernel with both (into a temporary folder), starts itself again with the sanitizer's library loaded first,
once for each instruction set, and calls both forms, forward and backward, with sizes, types, memory layouts and
locations drawn at random. Exit status 1 if a sanitizer complains; the line before its report says what was being run.
"""

import argparse
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = ("avx512", "avx2", "default")
ADDRESS_OPTIONS = "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1"  # torch itself leaks on purpose
STRANGE_NUMBERS = (float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 1.0, 0.0, -0.0, 2.0**31)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long to go on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        fuzz(load(arguments.inside, "__init__.py"), arguments.seed, arguments.seconds)
        return

    with tempfile.TemporaryDirectory() as folder:
        variant = load(ROOT, "build.py").build(Path(folder), allow_cuda=False, sanitize=True)
        compiler = os.environ.get("CXX", "g++")
        library = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        for index, capability in enumerate(CAPABILITIES):
            environment = os.environ | {
                "LD_PRELOAD": str(Path(library.stdout.strip()).resolve()),
                "ASAN_OPTIONS": ADDRESS_OPTIONS,
                "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
                "ATEN_CPU_CAPABILITY": capability,
                "OMP_NUM_THREADS": "2",
            }
            command = [sys.executable, __file__, "--inside", variant]
            command += ["--seconds", arguments.seconds / len(CAPABILITIES), "--seed", arguments.seed + index]
            print(f"== {capability}", flush=True)
            status = subprocess.run([str(part) for part in command], env=environment).returncode
            if status != 0:
                sys.exit(f"fuzz_asan.py: exit status {status} with ATEN_CPU_CAPABILITY={capability}")


def load(folder: Path, file: str):
    """A module or package from a path."""
    name = f"fuzzed_{folder.name}".replace("-", "_").replace(".", "_")
    spec = importlib.util.spec_from_file_location(name, folder / file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def fuzz(kernel, seed: int, seconds: float):
    """Random calls until the time is up."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    types = (torch.float32, torch.float16, torch.bfloat16)
    ops = kernel.operators.ops
    end, calls = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        shapes = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.randint(1, 4))]
        tokens, levels, points = sum(h * w for h, w in shapes), len(shapes), draw.choice((1, 2, 3, 4, 5, 8, 17))
        batch, queries, heads = draw.choice((0, 1, 2)), draw.choice((0, 1, 2, 7, 40)), draw.choice((1, 2, 3, 8))
        head_dim = 8 * draw.randint(1, 9)
        value_type, position_type, score_type = (draw.choice(types) for _ in range(3))
        fused, strided = draw.random() < 0.6, draw.random() < 0.3
        print(
            f"\r{calls} {shapes} batch={batch} queries={queries} heads={heads} head_dim={head_dim} points={points} "
            f"{value_type} {position_type} {score_type} fused={fused} strided={strided}".ljust(150),
            end="",
            flush=True,
        )
        torch.set_num_threads(draw.choice((1, 2, 3)))

        value = torch.randn(batch, tokens, heads, head_dim).to(value_type)
        if strided:
            value = torch.stack((value, value), dim=2).transpose(0, 1).contiguous().transpose(0, 1)[:, :, 1]
        positions = torch.randn(batch, queries, heads, levels, points, 2) * draw.choice((0.5, 1.0, 5.0))
        for number in draw.sample(STRANGE_NUMBERS, 3):
            positions[torch.rand(positions.shape) < 0.02] = number
        flat = kernel.operators.flat(shapes)
        if fused:
            reference = torch.rand(draw.choice((1, batch or 1)), queries, draw.choice((1, levels)), draw.choice((2, 4)))
            reference[torch.rand(reference.shape) < 0.02] = draw.choice(STRANGE_NUMBERS)
            logits = torch.randn(batch, queries, heads, levels * points).to(score_type)
            arguments = (value, flat, reference, positions.to(position_type), logits)
            forward, backward = ops.fused_ms_deform_attn_forward, ops.fused_ms_deform_attn_backward
        else:
            weights = torch.randn(batch, queries, heads, levels, points).to(score_type)
            arguments = (value, flat, positions, weights)
            forward, backward = ops.ms_deform_attn_forward, ops.ms_deform_attn_backward
        output = forward(*arguments)
        gradients = backward(torch.randn_like(output), *arguments, False)
        assert output.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients), "not finite"
        calls += 1
    print(f"\n{calls} calls, no complaint")


if __name__ == "__main__":
    main()
