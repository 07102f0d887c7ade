"""Folders of results that appear when they are complete, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .image_io import one_line


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Turns what goes wrong with a file into a ValueError that names it."""
    try:
        yield Path(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {one_line(error)}") from error


def check_new_folder(folder: Path) -> None:
    """Raises a ValueError unless a folder of that name can be made; an empty one may be there."""
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise ValueError(f"{folder} is there already; choose another folder, or remove it first.")
    nearest = next(parent for parent in folder.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be made: {nearest} is no folder that may be written to.")


@contextlib.contextmanager
def folder_written_whole(folder: Path, accelerator: Any = None) -> Iterator[Path]:
    """A temporary folder that gets its name when all is written, and is removed when that fails.

    Args:
        folder: where the finished folder goes.
        accelerator: if several processes write into the folder; each must call this.

    Raises:
        ValueError: the folder is there already, or cannot be made.
    """
    check_new_folder(folder)
    is_main = accelerator is None or accelerator.is_main_process
    names = [""]
    if is_main:
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            names = [tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)]
    if accelerator is not None:
        from accelerate.utils import broadcast_object_list

        names = broadcast_object_list(names)
    unfinished = Path(names[0])
    try:
        yield unfinished
        if is_main:
            with writing(folder):
                unfinished.chmod(0o755)
                unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
