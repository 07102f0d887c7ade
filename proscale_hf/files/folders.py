"""Folders that appear when they are complete, or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proscale_hf.files.whole import being_written, removed_on_failure, temporary_name, writing


UNFINISHED = ".unfinished"


def check_new_folder(folder: Path) -> None:
    """Raises a ValueError unless a folder of that name can be made; an empty one may be there."""
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise ValueError(f"{folder} is there already; choose another folder, or remove it first.")
    nearest = next(parent for parent in folder.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be made: {nearest} is no folder that may be written to.")


@contextlib.contextmanager
def folder_written_whole(folder: Path, accelerator: Any = None) -> Iterator[Path]:
    """A hidden folder that gets its name when all is written. When that fails, it is removed, and so are folders above
    it that were made for it.

    Args:
        folder: where the finished folder goes; with the usual permissions of a new folder.
        accelerator: if several processes write into the folder; each must call this.

    Raises:
        ValueError: the folder is there already, or cannot be made.
    """
    check_new_folder(folder)
    is_main = accelerator is None or accelerator.is_main_process
    new_parents = [parent for parent in folder.absolute().parents if not parent.exists()]
    own = temporary_name(folder)
    try:
        with removed_on_failure(own, shutil.rmtree):
            if is_main:
                with writing(folder):
                    own.mkdir(parents=True)
            unfinished = own if accelerator is None else _of_the_main_process(own)
            with removed_on_failure(unfinished, shutil.rmtree):
                yield unfinished
            if is_main:
                with writing(folder):
                    give_usual_permissions(unfinished)
                    unfinished.rename(folder)
    except BaseException:
        for parent in new_parents:
            with contextlib.suppress(OSError):  # another process has put something there
                parent.rmdir()
        raise


def _of_the_main_process(path: Path) -> Path:
    from accelerate.utils import broadcast_object_list

    return Path(broadcast_object_list([str(path)])[0])


def give_usual_permissions(folder: Path) -> None:
    """Gives a folder and all in it the permissions of new ones: some libraries make files for their owner alone."""
    probe = folder / ".permissions"
    probe.mkdir()
    usual_folder = probe.stat().st_mode
    usual_file = usual_folder & ~0o111
    probe.rmdir()
    folder.chmod(usual_folder)
    for path in folder.rglob("*"):
        path.chmod(usual_folder if path.is_dir() else usual_file)


@contextlib.contextmanager
def unfinished_folder(place: Path, accelerator: Any) -> Iterator[Path]:
    """A hidden folder for what is to become `place`: `.unfinished/NAME` beside it, on the disk of each machine.

    What a process that was killed has left there is removed first. The folder is gone afterwards, whatever happens.

    Args:
        place: where the caller moves the finished files.
        accelerator: an `accelerate.Accelerator`; all its processes must call this.

    Raises:
        OSError: the folder cannot be made.
    """
    unfinished = place.parent / UNFINISHED / place.name
    one_per_machine = accelerator.is_local_main_process
    if one_per_machine:
        shutil.rmtree(unfinished.parent, ignore_errors=True)
    accelerator.wait_for_everyone()  # machines may share a disk: none removes what another has made
    being_written.add(unfinished)
    try:
        if one_per_machine:
            unfinished.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        yield unfinished
        accelerator.wait_for_everyone()
    finally:
        if one_per_machine:
            shutil.rmtree(unfinished.parent, ignore_errors=True)
        being_written.discard(unfinished)


@contextlib.contextmanager
def folder_replaced_whole(folder: Path, accelerator: Any) -> Iterator[Path]:
    """An `unfinished_folder` that gets its name when all of it is on the disk; an older `folder` gives way only then.

    Args:
        folder: where the finished folder goes.
        accelerator: an `accelerate.Accelerator`; all its processes must call this.

    Raises:
        OSError: the folder cannot be made, a file did not reach the disk, or the folder cannot be moved.
    """
    with unfinished_folder(folder, accelerator) as unfinished:
        yield unfinished
        for has_turn in (accelerator.is_main_process, accelerator.is_local_main_process):
            accelerator.wait_for_everyone()
            if has_turn and unfinished.is_dir():  # in the second turn, on a disk that the main process does not see
                flush(unfinished)
                if folder.exists():
                    folder.rename(unfinished.with_name("replaced"))
                unfinished.rename(folder)


def flush(folder: Path) -> None:
    """Wait until all files of a folder are on the disk; a network disk may say only now that it is full."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
