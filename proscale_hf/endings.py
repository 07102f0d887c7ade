"""How a command ends: whatever stops it, its user reads one line, and nothing half-written is left.

`end_well` is for the beginning of a program, before the imports that take seconds. What the program does then needs no
thought of interrupts, closed pipes or too little memory. `interruptible` does the same for a part of a program.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from proscale_hf.files.memory import is_out_of_memory
from proscale_hf.files.text import escaped, one_line
from proscale_hf.files.whole import being_written


INTERRUPTED = 130  # exit status, as shells have it
IMPORTING = "<frozen importlib._bootstrap>"


@dataclass
class Interrupts:
    """The process whose interrupts are caught here, and whether one came."""

    owner: int = 0
    came: bool = False


_interrupts = Interrupts()


def end_well() -> None:
    """Lets this process, from now on, end in one line whatever stops it. A mistake in the code still has its traceback.

    An interrupt (Ctrl-C) ends it with status 130; a reader of its output that has gone, `head` say, with 0.
    """
    open_streams()
    _catch_interrupts()
    sys.excepthook = _last_words
    sys.unraisablehook = _unraisable
    atexit.register(_flush)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Does for a part of a program what `end_well` does; the part itself asks `status_of` about its errors."""
    open_streams()
    handler = _catch_interrupts()
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started inside do not hear interrupts. This process does, and ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def status_of(error: BaseException) -> int | None:
    """Says in one line on stderr what stopped a command.

    Args:
        error: what was raised.

    Returns:
        The exit status; None for an error that is not the user's to mend, about which nothing is said.
    """
    if isinstance(error, KeyboardInterrupt) or _interrupts.came:
        complain("interrupted")  # libraries turn an interrupt into other errors, too
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        forget_output()
        return 0
    if isinstance(error, Exception) and is_out_of_memory(error):
        complain(
            f"error: there is not enough memory ({one_line(error)[:200]}); try smaller images, fewer at once, or a "
            "smaller model"
        )
        return 1
    return None


def complain(text: str) -> None:
    """Prints a text to stderr, without what a terminal would take for a command."""
    start = "\r\x1b[K" if sys.stderr.isatty() else ""  # over a line of progress
    with contextlib.suppress(OSError, ValueError):
        print(start + "\n".join(map(escaped, text.split("\n"))), file=sys.stderr, flush=True)


def forget_output() -> None:
    """Python does not try again, when it ends, to write what could not be written."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        forget_output()


def open_streams() -> None:
    """Lets stdout and stderr take every text, and gives a process that was started without them a place for it."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                _reserve(descriptor)
            setattr(sys, name, open(os.devnull, "w" if descriptor else "r", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # ASCII terminals, names of files that are no UTF-8


def _reserve(descriptor: int) -> None:
    """Opens nothing under the number of a standard stream, so that no file gets it, and what libraries print."""
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)


def _catch_interrupts() -> Any:
    """Returns the earlier handler; None if interrupts are none of this thread's business, or ignored on purpose."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return None
    _interrupts.owner, _interrupts.came = os.getpid(), False
    return signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # who does not want to wait for the clearing away may go at once
    _interrupts.came = True
    if os.getpid() != _interrupts.owner:  # a process that was forked: its parent will say it
        os._exit(INTERRUPTED)
    if _is_importing(frame) and not being_written:  # a library would make another error of it, or pass over it
        complain("interrupted")
        os._exit(INTERRUPTED)
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != IMPORTING:
        frame = frame.f_back
    return frame is not None


def _last_words(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    status = status_of(error)
    if status is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        raise SystemExit(status)


def _unraisable(event: Any) -> None:
    """An interrupt that came where Python cannot pass it on is sent again."""
    if isinstance(event.exc_value, KeyboardInterrupt):
        with contextlib.suppress(RuntimeError, ValueError):  # Python is ending anyway
            signal.signal(signal.SIGINT, _interrupt)
            threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
    elif not isinstance(event.exc_value, BrokenPipeError):
        sys.__unraisablehook__(event)
