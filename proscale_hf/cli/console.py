"""What every subcommand says to its user: one-line errors, progress, and clean text."""

import contextlib
import sys
import threading
from collections.abc import Iterator


PATIENCE = 2.0  # seconds a step may stay silent when no one watches a terminal


class CommandError(Exception):
    """A failure the user can act on: its text is the one line to print.

    Args:
        message: what is wrong and what to do.
        exit_code: 1 for a job that failed, 2 for a command line that cannot be meant.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


@contextlib.contextmanager
def user_errors(exit_code: int = 1) -> Iterator[None]:
    """Turns a ValueError of the library, which explains itself in one line, into a `CommandError`."""
    try:
        yield
    except ValueError as error:
        raise CommandError(str(error), exit_code) from error


@contextlib.contextmanager
def progress(message: str) -> Iterator[None]:
    """Says on stderr what is being done: at once on a terminal (and wiped after), else only if it takes long."""
    on_terminal = sys.stderr.isatty()
    text = f"\r\x1b[K{message}..." if on_terminal else f"{message}...\n"

    def say() -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    timer = threading.Timer(0.0 if on_terminal else PATIENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if on_terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
