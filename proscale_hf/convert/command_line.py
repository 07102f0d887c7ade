"""What the converters' command lines have in common: where the model goes, its classes, and how errors are told."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging

from proscale_hf.convert import ConversionError
from proscale_hf.data.categories import read_categories


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options about what is written."""
    parser.add_argument("--output", type=Path, required=True, help="the folder to write, new or empty")
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE.json",
        help="the classes: COCO-panoptic categories, or a list of names (known for COCO, ADE20K, Cityscapes and "
        "Mapillary Vistas)",
    )
    parser.add_argument(
        "--max-shard-size", default="50GB", metavar="SIZE", help="split weights into files of this size, 5GB say"
    )


def given_categories(options: argparse.Namespace) -> list[dict[str, Any]] | None:
    """The categories in the file of `--labels`; raises `ConversionError` if it has none."""
    try:
        return None if options.labels is None else read_categories(options.labels)
    except ValueError as error:
        raise ConversionError(str(error)) from error


def run_command(run: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Carry a command out, without the libraries' own messages; what fails is one line. Returns the exit status."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    try:
        run(options)
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
