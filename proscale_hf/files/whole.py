"""Files that appear when they are complete, or not at all."""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from proscale_hf.files.text import one_line


being_written: set[Path] = set()  # temporary files and folders, for `endings`


@contextlib.contextmanager
def removed_on_failure(temporary: Path, remove: Callable[[Path], object] = Path.unlink) -> Iterator[None]:
    """Removes a temporary file or folder if anything, an interrupt too, keeps it from getting its own name."""
    being_written.add(temporary)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            remove(temporary)
        raise
    finally:
        being_written.discard(temporary)


def temporary_name(target: Path) -> Path:
    """A hidden name beside `target` that nobody else has, not even another thread or machine."""
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.partial")


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Turns what goes wrong with a file into a ValueError that names it."""
    try:
        yield Path(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {one_line(error)}") from error


def check_writable(path: str | os.PathLike) -> None:
    """Finds out before a long computation whether a file can be written to `path`.

    Raises:
        ValueError: it cannot; the message says why.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file name to write to")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; give another name to write to")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path.name} into; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"the folder {path.parent} may not be written to; choose another place for {path.name}")


def write_whole(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write` on a temporary file beside `path`, then renames it, so that no half-written file can be left.

    Args:
        path: where the finished file goes; a file of that name is replaced.
        write: puts the content into the binary file it is given.

    Raises:
        ValueError: the file cannot be written.
    """
    target = Path(os.path.realpath(path))  # a link stays a link, its target is what is replaced
    temporary = temporary_name(target)
    try:
        with removed_on_failure(temporary):
            with open(temporary, "xb") as file:
                write(file)
            os.replace(temporary, target)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write {path}: {one_line(error)}") from error
