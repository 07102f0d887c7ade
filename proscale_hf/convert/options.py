"""The options that all converters have: where the model goes, and its classes."""

import argparse
from pathlib import Path
from typing import Any

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


def add_comparison_options(parser: argparse.ArgumentParser) -> None:
    """Add the options about numbers that the original gave."""
    parser.add_argument(
        "--expected",
        type=Path,
        metavar="FILE.safetensors",
        help="compare stage by stage with tensors recorded from the original, and fail if they depart",
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest error for --expected (default: %(default)s)"
    )


def given_categories(options: argparse.Namespace) -> list[dict[str, Any]] | None:
    """The categories in the file of `--labels`; raises `ConversionError` if it has none."""
    try:
        return None if options.labels is None else read_categories(options.labels)
    except ValueError as error:
        raise ConversionError(str(error)) from error
