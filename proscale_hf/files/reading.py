"""Files that somebody else made: only regular files are opened, and what goes wrong in them is one line.

Libraries raise errors of any type over a damaged or hostile file. So whoever hands a library such a file does it inside
`reading`, which turns all of them into one error that names the file.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import BinaryIO

from proscale_hf.files.memory import is_out_of_memory
from proscale_hf.files.text import escaped, one_line, printable


LONGEST_REASON = 200  # characters of a library's message
# Without the first, opening a pipe waits until somebody writes into it. Windows has the second alone.
AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class FileError(ValueError):
    """A file cannot be read; the text is one line that names the file and says what to do."""


def open_file(path: str | os.PathLike, what: str = "file") -> BinaryIO:
    """Opens a file for reading bytes.

    Args:
        path: of the file.
        what: it is, for messages, such as "picture".

    Raises:
        FileError: there is no such file, it may not be read, or it is a folder, a device or a pipe, which could have no
            end.
    """
    name = escaped(str(path))
    try:
        descriptor = os.open(path, os.O_RDONLY | AT_ONCE)
    except FileNotFoundError:
        raise FileError(f"there is no {what} {name}; check the path") from None
    except PermissionError:
        if os.path.isdir(path):  # what Windows says of a folder
            raise FileError(f"{name} is a folder, not a {what}") from None
        raise FileError(f"{name} may not be read; check its permissions") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{name} cannot be opened: {getattr(error, 'strerror', None) or one_line(error)}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise FileError(f"{name} is a {'folder' if stat.S_ISDIR(mode) else 'device or pipe'}, not a {what}")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | os.PathLike, most: int, what: str = "file") -> bytes:
    """All bytes of a file.

    Args:
        path: a regular file.
        most: how many bytes such a file can have; a larger one is refused.
        what: it is, for messages.

    Raises:
        FileError: as for `open_file`, or the file is larger.
    """
    with open_file(path, what) as file, reading(path):
        content = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)
    if len(content) > most:
        raise FileError(f"{escaped(str(path))} is larger than the {most:,} bytes that a {what} may have")
    return content


@contextlib.contextmanager
def reading(
    path: str | os.PathLike,
    problem: str = "cannot be read",
    error_type: type[ValueError] = FileError,
    reason: Callable[[Exception], str] = one_line,
) -> Iterator[None]:
    """Turns whatever is raised over a file's content into one error of one line, which names the file.

    Args:
        path: of the file.
        problem: what is said of it, such as "is no valid JSON".
        error_type: of the error. Errors of this type pass as they are, and a `FileError` keeps its text.
        reason: the text behind the problem, from the library's error.

    Raises:
        ValueError: of `error_type`.
    """
    try:
        yield
    except error_type:
        raise
    except FileError as error:
        raise error_type(str(error)) from error
    except Exception as error:
        name = escaped(str(path))
        if is_out_of_memory(error):
            raise error_type(f"there is not enough memory to read {name}") from error
        raise error_type(f"{name} {problem}: {printable(reason(error), LONGEST_REASON)}") from error
