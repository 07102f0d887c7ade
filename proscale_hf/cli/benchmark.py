"""`proscale benchmark`: this package's models and others side by side, on this machine."""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proscale_hf.benchmarking.workload import BACKBONES, BACKENDS, DTYPES, MODELS, MODES, Candidate, Workload
from proscale_hf.cli.console import CommandError, progress, user_errors
from proscale_hf.cli.numbers import image_size


DEFAULT_MODELS = ("proscale:float32:pytorch", "mask2former")


def add_benchmark_command(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand to the `proscale` command."""
    models = "; ".join(f"{name}: {meaning}" for name, meaning in MODELS.items())
    parser = commands.add_parser(
        "benchmark",
        help="compare speed and memory of models",
        description="Run models in turns on the same input and print times, memory and ratios. "
        f"A model is NAME[:TYPE[:BACKEND]]. Names are {models}. Types are {', '.join(DTYPES)}; "
        f"backends are {', '.join(BACKENDS)}. Sizes, batches, queries and objects may be lists, such as "
        "512x512,1024x1024: each combination is measured, and the table shows how time and memory grow.",
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
        "--size",
        type=several(size),
        default="800x1344",
        metavar="HxW[,...]",
        help="of the image in pixels (default: %(default)s)",
    )
    scaled = {
        "batch": ("1", "images in a step"),
        "queries": ("100", "object queries"),
        "objects": ("10", "in each training image"),
    }
    for name, (default, meaning) in scaled.items():
        parser.add_argument(
            f"--{name}",
            type=several(count),
            default=default,
            metavar="N[,...]",
            help=f"{meaning} (default: %(default)s)",
        )
    counts = {
        "labels": (133, "classes"),
        "kept": (20, "queries that post-processing keeps"),
        "threads": (0, "of the CPU; 0 is PyTorch's choice"),
    }
    for name, (default, meaning) in counts.items():
        parser.add_argument(
            f"--{name}", type=count, default=default, metavar="N", help=f"{meaning} (default: %(default)s)"
        )
    parser.add_argument(
        "--mixed", action="store_true", help="every second image stands upright, and the batch is padded; no training"
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
    height, width = image_size(text)
    if not (32 <= height <= 8192 and 32 <= width <= 8192):
        raise argparse.ArgumentTypeError(f"{text!r} must have sides of 32 to 8192 pixels")
    return height, width


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """`"1,2,4"`: values of a kind."""
    return lambda text: [kind(part) for part in text.split(",")]


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
    from proscale_hf.benchmarking.comparison import compare
    from proscale_hf.benchmarking.tables import to_json, to_markdown
    from proscale_hf.files.whole import check_writable, write_whole

    with user_errors(exit_code=2):
        candidates = [Candidate.parse(text) for text in options.models or DEFAULT_MODELS]
        if options.json is not None:
            check_writable(options.json)
    if not options.repeats or 0 in options.batch or options.kept > min(options.queries):
        raise CommandError("--repeats and --batch must be at least 1, and --kept at most --queries", exit_code=2)
    if options.mixed and (options.mode == "training" or any(candidate.model == "eomt" for candidate in candidates)):
        raise CommandError("--mixed is not for training, and not for EoMT, which takes squares", exit_code=2)
    names = ("mode", "device", "backbone", "labels", "kept", "stages", "threads", "mixed")
    workloads = [
        Workload(
            height=height,
            width=width,
            batch=batch,
            queries=queries,
            objects=objects,
            **{n: getattr(options, n) for n in names},
        )
        for (height, width), batch, queries, objects in itertools.product(
            options.size, options.batch, options.queries, options.objects
        )
    ]
    comparisons = []
    command = shlex.join((Path(sys.argv[0]).name, *sys.argv[1:]))
    try:
        with progress("measuring"):
            for workload in workloads:
                comparisons.append(compare(candidates, workload, options.repeats))
    except RuntimeError as error:
        raise CommandError(str(error)) from error
    finally:  # also if only the last of them was too much for this machine
        if comparisons:
            print(to_markdown(comparisons, command))
            if options.json is not None:
                content: dict[str, Any] = to_json(comparisons, command)
                with user_errors():
                    write_whole(options.json, lambda file: file.write(json.dumps(content, indent=1).encode()))
