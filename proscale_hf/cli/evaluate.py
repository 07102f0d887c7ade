"""`proscale evaluate`: PQ, AP and mIoU of a model on a data set, in one pass."""

import argparse
import contextlib
import importlib
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proscale_hf.cli.command_line import Subcommand
from proscale_hf.cli.console import CommandError, needed_libraries, progress, user_errors
from proscale_hf.cli.dataset_options import add_dataset_options, open_chosen_dataset
from proscale_hf.cli.device import add_device_options, place_model
from proscale_hf.cli.loading import load_model
from proscale_hf.cli.numbers import natural, positive
from proscale_hf.evaluation.agreement import TASKS


# Options that say nothing about stored predictions.
OF_MODELS = ("model", "dataset", "dataset_settings", "tasks", "instance_annotations", "samples", "save_predictions")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument(
        "--model",
        metavar="DIR-OR-HUB-ID",
        help="a folder, a Hub id or a short name (default: the small demo model that comes with the package)",
    )
    add_dataset_options(parser, required=False)
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="an image or annotation that cannot be used ends the evaluation (raise, the default), or is left out and "
        "listed in the report (skip)",
    )
    parser.add_argument(
        "--tasks", type=task_list, metavar="TASK,...", help=f"of {', '.join(TASKS)} (default: all that the data allow)"
    )
    parser.add_argument(
        "--instance-annotations",
        metavar="FILE",
        help="COCO instance JSON to measure AP against, as the paper does for COCO (default: the data set's things)",
    )
    parser.add_argument("--output", metavar="DIR", help="new folder for results.json and results.md")
    parser.add_argument(
        "--save-predictions", action="store_true", help="write the predictions there, too, as COCO files"
    )
    parser.add_argument("--samples", type=positive, metavar="N", help="only the first N images")
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="images at a time (default: 1)")
    parser.add_argument(
        "--workers",
        type=natural,
        metavar="N",
        help="processes that read images (default: 2, and with --predictions one per core)",
    )
    add_device_options(parser)
    stored = parser.add_argument_group(
        "stored predictions",
        "Files in COCO-panoptic format, instead of a model and a data set.",
    )
    stored.add_argument(
        "--predictions",
        nargs="+",
        type=Path,
        metavar=("JSON", "FOLDER"),
        help="what is measured: a JSON file, and its folder of PNG files (default: the file's name without .json)",
    )
    stored.add_argument("--truth", nargs="+", type=Path, metavar=("JSON", "FOLDER"), help="the truth, in the same way")


def task_list(text: str) -> list[str]:
    """`"panoptic,semantic"`."""
    tasks = text.split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no task; choose from {', '.join(TASKS)}")
    return tasks


def run(options: argparse.Namespace) -> None:
    """Measures a model, or stored predictions."""
    if options.predictions is None and options.truth is None:
        evaluate_model(options)
    else:
        evaluate_stored_predictions(options)


def evaluate_stored_predictions(options: argparse.Namespace) -> None:
    """Measures files against files."""
    from proscale_hf.evaluation.panoptic_files import evaluate_files
    from proscale_hf.evaluation.report import to_markdown, write_report
    from proscale_hf.files.folders import check_new_folder, folder_written_whole

    if options.predictions is None or options.truth is None:
        raise CommandError("--predictions and --truth belong together: give both", exit_code=2)
    if given := [name for name in OF_MODELS if getattr(options, name)]:
        option = "set" if given[0] == "dataset_settings" else given[0].replace("_", "-")
        raise CommandError(f"--{option} is for models; --predictions are files, and do without", exit_code=2)
    files = (*json_and_folder("--truth", options.truth), *json_and_folder("--predictions", options.predictions))
    if options.output is not None:
        with user_errors(exit_code=2):
            check_new_folder(Path(options.output))
    processes = None if options.workers is None else max(1, options.workers)
    with progress("measuring the predictions"), user_errors():
        report = {**describe_files(options), **evaluate_files(*files, processes)}
        if options.output is not None:
            with folder_written_whole(Path(options.output)) as folder:
                write_report(report, folder)
    print(to_markdown(report), end="")


def json_and_folder(option: str, paths: Sequence[Path]) -> tuple[Path, Path]:
    """A JSON file and its folder of PNG files, which has the file's name without the ending if it is not given."""
    if len(paths) > 2:
        raise CommandError(f"{option} takes a JSON file and a folder, not {len(paths)} names", exit_code=2)
    return (paths[0], paths[0].with_suffix("")) if len(paths) == 1 else (paths[0], paths[1])


def evaluate_model(options: argparse.Namespace) -> None:
    """Runs a model over a data set, in each process if `accelerate launch` started several."""
    if options.dataset is None:
        raise CommandError("give --dataset, or --predictions and --truth (see proscale evaluate --help)", exit_code=2)
    if options.save_predictions and options.output is None:
        raise CommandError("--save-predictions needs --output, the folder to put them into", exit_code=2)
    with needed_libraries():
        importlib.import_module("pycocotools")  # needed later, when much time would be lost

        from proscale_hf.evaluation.agreement import choose_tasks
        from proscale_hf.evaluation.instance_truth import InstanceAnnotations
        from proscale_hf.evaluation.report import to_markdown
        from proscale_hf.files.folders import check_new_folder
    if options.output is not None:
        with user_errors(exit_code=2):
            check_new_folder(Path(options.output))
    with needed_libraries("train"):
        accelerator = join_processes(options.device)
    truth = None
    with progress("opening the data set"), user_errors(), main_process_first(accelerator):
        dataset = open_chosen_dataset(options, on_error=options.on_error)
        if options.instance_annotations is not None:
            truth = InstanceAnnotations(options.instance_annotations, dataset.categories)
        tasks = choose_tasks(dataset, options.tasks, truth)
        if options.samples is not None:
            dataset = dataset.select(range(min(options.samples, len(dataset))))
    with progress("loading the model"):
        model, image_processor = load_model(options.model)
        place_model(model, options, None if accelerator is None else accelerator.device)
    report = measure(options, model, image_processor, dataset, accelerator, tasks=tasks, instance_annotations=truth)
    if accelerator is None or accelerator.is_main_process:
        print(to_markdown(report), end="")
    if accelerator is not None:
        accelerator.end_training()


def join_processes(device: str | None) -> Any:
    """The `Accelerator` of this process if `accelerate launch` (or torchrun) started several, else None."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    if device not in (None, "cpu"):
        raise CommandError("with several processes, --device can only be cpu: each takes its own GPU", exit_code=2)
    from accelerate import Accelerator

    return Accelerator(cpu=device == "cpu")


def main_process_first(accelerator: Any) -> contextlib.AbstractContextManager:
    """What one process puts into a cache, the others find there."""
    return contextlib.nullcontext() if accelerator is None else accelerator.main_process_first()


def measure(
    options: argparse.Namespace, model: Any, image_processor: Any, dataset: Any, accelerator: Any, **settings: Any
) -> dict[str, Any]:
    """Evaluates, and writes what `--output` and `--save-predictions` ask for; what the report is made of."""
    from proscale_hf.evaluation.coco_files import PredictionFiles, merge_parts
    from proscale_hf.evaluation.evaluator import evaluate
    from proscale_hf.evaluation.report import write_report
    from proscale_hf.files.folders import folder_written_whole
    from proscale_hf.files.text import one_line

    rank, is_main = (0, True) if accelerator is None else (accelerator.process_index, accelerator.is_main_process)
    with user_errors(), contextlib.ExitStack() as stack:
        files = None
        if options.output is not None:
            folder = stack.enter_context(folder_written_whole(Path(options.output), accelerator))
            if options.save_predictions:
                files = stack.enter_context(PredictionFiles(folder, dataset.categories, rank))
        if not sys.stderr.isatty():
            stack.enter_context(progress(f"evaluating {len(dataset)} images"))
        try:
            results = evaluate(
                model,
                image_processor,
                dataset,
                batch_size=options.batch_size,
                workers=2 if options.workers is None else options.workers,
                accelerator=accelerator,
                files=files,
                show_progress=True,
                **settings,
            )
        except (RuntimeError, MemoryError) as error:  # torch says so when memory does not suffice
            raise CommandError(f"the evaluation failed: {one_line(error)}") from error
        report = {**describe(options, model, dataset, accelerator), **results}
        if files is not None:
            files.close()
            if accelerator is not None:
                accelerator.wait_for_everyone()
            if is_main:
                merge_parts(folder, dataset.categories)
        if options.output is not None and is_main:
            write_report(report, folder)
    return report


def command() -> str:
    """The command line of this process."""
    words = sys.argv[2:] if sys.argv[1:2] == ["evaluate"] else sys.argv[1:]  # without it: examples/evaluate.py
    return shlex.join(("proscale", "evaluate", *words))


def describe_files(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers of stored predictions depend on."""
    import numpy as np

    from proscale_hf.version import __version__

    versions = {"python": platform.python_version(), "numpy": np.__version__, "proscale_hf": __version__}
    return {"command": command(), "model": str(options.predictions[0]), "versions": versions}


def describe(options: argparse.Namespace, model: Any, dataset: Any, accelerator: Any) -> dict[str, Any]:
    """What the numbers of a model depend on."""
    from proscale_hf.benchmarking.tables import versions
    from proscale_hf.version import __version__

    processes = {} if accelerator is None else {"processes": str(accelerator.num_processes)}
    return {
        "command": command(),
        "model": options.model or "demo",
        "versions": {**versions(model.device), **processes, "proscale_hf": __version__},
        "categories": dataset.categories,
    }


EVALUATE = Subcommand(
    name="evaluate",
    help="measure a model on a data set",
    description="Print panoptic quality (PQ, SQ, RQ), mask AP of the things and mean IoU of a model as a Markdown "
    "table, all measured in one pass over a data set; or the panoptic quality of predictions that lie in files.",
    add_options=add_options,
    run=run,
)
