"""Writes the converted model as a folder for `from_pretrained`, completely or not at all."""

import os
import re
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from proscale_hf.convert import ConversionError
from proscale_hf.files.folders import folder_written_whole


def check_output(output: str | Path) -> None:
    """
    Make sure, before any work is done, that the new folder can be written.

    Args:
        output: The folder to write. It may exist if it is empty.

    Raises:
        ConversionError: something else is in its place, or the folder above cannot be written to.
    """
    output = _absolute(output)
    if output.is_symlink():
        raise ConversionError(f"{output} is a symbolic link; give the folder itself.")
    if output.is_mount() or output == Path.cwd():
        raise ConversionError(f"{output} is a folder in use and cannot be replaced; give a new one inside it.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} exists already; give a new or an empty folder.")
    base = _existing_folder_above(output)
    if not base.is_dir() or not os.access(base, os.W_OK | os.X_OK):
        raise ConversionError(f"{output} cannot be written: {base} is no folder that you may write to.")


def check_shard_size(max_shard_size: str) -> None:
    """Raise if the largest size of a weights file is not a number of bytes above 0 with a unit, like 200MB."""
    size = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)[KMGT]B", max_shard_size.upper())
    if not size or not float(size[1]):
        raise ConversionError(f"A maximum shard size looks like 200MB or 5GB, not like {max_shard_size!r}.")


def write_model_folder(
    model: PreTrainedModel, image_processor: BaseImageProcessor, output: str | Path, max_shard_size: str = "50GB"
) -> None:
    """
    Write a model and its image processor into a new folder, completely or not at all.

    Args:
        model: Its `save_pretrained` writes into the folder.
        image_processor: Likewise.
        output: The folder to write, new or empty. The folders above it are made.
        max_shard_size: Weights above this size are spread over several files, such as `200MB` or `5GB`.

    Raises:
        ConversionError: see `check_output` and `check_shard_size`, or the disk is full.
    """
    check_shard_size(max_shard_size)
    check_output(output)
    output = _absolute(output)
    try:
        with folder_written_whole(output) as folder:
            image_processor.save_pretrained(folder)  # first: the model's card has the costs for its size
            model.save_pretrained(folder, max_shard_size=max_shard_size)
    except OSError as error:
        raise ConversionError(f"{output} cannot be written: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise ConversionError(f"{output} cannot be written: {error}.") from error
    except ValueError as error:
        raise ConversionError(f"{error}.") from error


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))  # unlike `Path.resolve`, does not follow links


def _existing_folder_above(path: Path) -> Path:
    return next(folder for folder in path.parents if folder.exists())
