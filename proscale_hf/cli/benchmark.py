"""`proscale benchmark`: this package's models and others side by side, on this machine."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from typing import Any

from ..benchmarking.workload import BACKBONES, BACKENDS, DTYPES, MODELS, MODES, Candidate, Workload
from .console import CommandError, progress, user_errors


DEFAULT_MODELS = ("proscale:float32:pytorch", "mask2former")


def add_benchmark_command(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand to the `proscale` command."""
    models = "; ".join(f"{name}: {meaning}" for name, meaning in MODELS.items())
    parser = commands.add_parser(
        "benchmark",
        help="compare speed and memory of models",
        description="Run models in turns on the same input and print times, memory and ratios. "
        f"A model is NAME[:TYPE[:BACKEND]]. Names are {models}. Types are {', '.join(DTYPES)}; "
        f"backends are {', '.join(BACKENDS)}.",
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="default: " + " ".join(DEFAULT_MODELS) + "; the last is the reference",
    )
    modes = "; ".join(f"{name}: {meaning}" for name, meaning in MODES.items())
    parser.add_argument("--mode", choices=MODES, default="inference", help=f"{modes} (default: %(default)s)")
    parser.add_argument(
        "--size", type=size, default=(800, 1344), metavar="HxW", help="of the image in pixels (default: 800x1344)"
    )
    counts = {
        "batch": (1, "images in a step"),
        "labels": (133, "classes"),
        "queries": (100, "object queries"),
        "kept": (20, "queries that post-processing keeps"),
        "objects": (10, "in each training image"),
        "threads": (0, "of the CPU; 0 is PyTorch's choice"),
    }
    for name, (default, meaning) in counts.items():
        parser.add_argument(
            f"--{name}", type=count, default=default, metavar="N", help=f"{meaning} (default: {default})"
        )
    parser.add_argument("--repeats", type=count, default=5, metavar="N", help="rounds that count (default: 5)")
    parser.add_argument("--backbone", choices=BACKBONES, default="swin-t", help="default: %(default)s")
    parser.add_argument("--stages", type=stages, default=(3, 3, 3), metavar="P1,P2,P3", help="default: 3,3,3")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="also write everything that was measured")
    parser.set_defaults(run=run_benchmark)


def number(text: str, is_possible: Callable[[int], bool]) -> int:
    """A whole number from the command line."""
    if not text.isdecimal() or not is_possible(int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a possible number")
    return int(text)


def count(text: str) -> int:
    """0 or more."""
    return number(text, lambda value: value < 100_000)


def size(text: str) -> tuple[int, int]:
    """`"800x1344"`: height and width."""
    height, _, width = text.lower().partition("x")
    return number(height, lambda value: 32 <= value <= 8192), number(width, lambda value: 32 <= value <= 8192)


def stages(text: str) -> tuple[int, ...]:
    """`"3,3,3"`."""
    return tuple(number(part, lambda value: 1 <= value <= 100) for part in text.split(","))


def run_benchmark(options: argparse.Namespace) -> None:
    """Carries the subcommand out.

    Args:
        options: the parsed command line.

    Raises:
        CommandError: anything that the user can mend.
    """
    from ..benchmarking.comparison import compare
    from ..benchmarking.tables import to_json, to_markdown
    from ..image_io import check_writable, write_whole

    with user_errors(exit_code=2):
        candidates = [Candidate.parse(text) for text in options.models or DEFAULT_MODELS]
        if options.json is not None:
            check_writable(options.json)
    if not options.repeats or not options.batch or options.kept > options.queries:
        raise CommandError("--repeats and --batch must be at least 1, and --kept at most --queries", exit_code=2)
    height, width = options.size
    names = ("mode", "batch", "device", "backbone", "labels", "queries", "kept", "objects", "stages", "threads")
    workload = Workload(height=height, width=width, **{name: getattr(options, name) for name in names})
    try:
        with progress("measuring"):
            measurements = compare(candidates, workload, options.repeats)
    except RuntimeError as error:
        raise CommandError(str(error)) from error
    command = shlex.join(("proscale", *sys.argv[1:]))
    print(to_markdown(measurements, workload, command))
    if options.json is not None:
        content: dict[str, Any] = to_json(measurements, workload, command)
        with user_errors():
            write_whole(options.json, lambda file: file.write(json.dumps(content, indent=1).encode()))
