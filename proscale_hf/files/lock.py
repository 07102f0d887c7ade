"""An output folder that one process, a training say, has for itself."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_descriptors: set[int] = set()  # of the folders that this process has


def _leave_to_the_parent() -> None:
    """A process that was forked, to load images say, must not keep a folder longer than its parent."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_leave_to_the_parent)


@contextlib.contextmanager
def folder_in_use(folder: Path, is_main: bool = True) -> Iterator[None]:
    """Keeps other processes from a folder, which is made if need be.

    The system does that, so it ends with the process, however that ends, and leaves no file behind. Windows and some
    network disks cannot do it; there nothing is kept from anybody.

    Args:
        folder: where the process will write.
        is_main: one of several processes that work together, and the one that speaks for all.

    Raises:
        ValueError: another process has the folder, or it cannot be made.
    """
    if not is_main or fcntl is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {error.strerror}") from error
    _descriptors.add(descriptor)
    try:
        _lock(descriptor, folder)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing came of it
    finally:
        _descriptors.discard(descriptor)
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise ValueError(
                f"{folder} is in use by another process, perhaps a training: wait for its end, or choose another folder"
            ) from error
