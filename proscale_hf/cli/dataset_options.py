"""Choosing a data set on the command line: `--dataset NAME --set OPTION=VALUE ...`."""

import argparse
import json
from typing import Any

from proscale_hf.cli.console import CommandError, needed_libraries, user_errors


# Their classes, in `data.sources`, need libraries that the help does without.
DATASETS = ("coco_panoptic", "coco_instance", "cityscapes", "ade20k", "folder", "hub")


def add_dataset_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds `--dataset` and `--set` to a subcommand."""
    parser.add_argument("--dataset", required=required, metavar="NAME", help=f"one of {', '.join(DATASETS)}")
    parser.add_argument(
        "--set",
        action="append",
        type=setting,
        default=[],
        dest="dataset_settings",
        metavar="OPTION=VALUE",
        help="an option of the data set, such as root=FOLDER or split=val2017; may be given several times. The answer "
        "to an unknown option lists those of the data set",
    )


def setting(text: str) -> tuple[str, Any]:
    """Reads `"root=coco"`. JSON, such as true, 255, [0,255] or "2017", becomes a value; all else is text."""
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not OPTION=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def open_chosen_dataset(options: argparse.Namespace, **settings: Any) -> Any:
    """The `SegmentationDataset` that the command line names.

    Args:
        options: the parsed command line.
        settings: further arguments of `open_dataset`.

    Raises:
        CommandError: it cannot be opened, or a library for it is missing.
    """
    with needed_libraries():
        import datasets

        from proscale_hf.data.opening import open_dataset

    datasets.disable_progress_bars()
    chosen = dict(options.dataset_settings)
    if len(chosen) < len(options.dataset_settings):
        raise CommandError("--set gives the same option twice", exit_code=2)
    with user_errors():
        return open_dataset(options.dataset, **settings, **chosen)
