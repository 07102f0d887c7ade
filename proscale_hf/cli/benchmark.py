"""`proscale benchmark`: this package's models and others side by side, on this machine."""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from proscale_hf.benchmarking.workload import BACKBONES, BACKENDS, DTYPES, MODELS, MODES, Candidate, Workload
from proscale_hf.cli.command_line import Subcommand
from proscale_hf.cli.console import CommandError, progress, user_errors
from proscale_hf.cli.numbers import input_size, whole_number


DEFAULT_MODELS = ("proscale:float32:pytorch", "mask2former")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="default: " + " ".join(DEFAULT_MODELS) + "; the last is the reference",
    )
    parser.add_argument("--mode", choices=MODES, default="inference", help=f"{explained(MODES)} (default: %(default)s)")
    parser.add_argument(
        "--size",
        type=several(input_size),
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


def explained(choices: Mapping[str, str]) -> str:
    """Choices and their meanings, for the help."""
    return "; ".join(f"{name}: {meaning}" for name, meaning in choices.items())


def count(text: str) -> int:
    """0 or more."""
    return whole_number(text, 0, 99_999)


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """`"1,2,4"`: values of a kind."""
    return lambda text: [kind(part) for part in text.split(",")]


def stages(text: str) -> tuple[int, ...]:
    """`"3,3,3"`."""
    return tuple(whole_number(part, 1, 100) for part in text.split(","))


def run(options: argparse.Namespace) -> None:
    """Measures the models on all workloads, and prints tables."""
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


BENCHMARK = Subcommand(
    name="benchmark",
    help="compare speed and memory of models",
    description="Run models in turns on the same input and print times, memory and ratios. "
    f"A model is NAME[:TYPE[:BACKEND]]. Names are {explained(MODELS)}. "
    f"Types are {', '.join(DTYPES)}; backends are {', '.join(BACKENDS)}. Sizes, batches, queries and objects may be "
    "lists, such as 512x512,1024x1024: each combination is measured, and the table shows how time and memory grow.",
    add_options=add_options,
    run=run,
)
