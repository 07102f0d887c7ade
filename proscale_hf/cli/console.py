"""What every subcommand says to its user: errors in one line, and progress."""

import contextlib
import sys
import threading
from collections.abc import Iterator


PATIENCE = 2.0  # seconds a step may stay silent when no one watches a terminal


class CommandError(Exception):
    """A failure the user can act on: its text is what to print.

    Args:
        message: says what is wrong and what to do. It becomes one line.
        exit_code: 1 for a job that failed, 2 for a command line that cannot be meant.
        keep_lines: the message is a list or a table, and stays as it is.
    """

    def __init__(self, message: str, exit_code: int = 1, keep_lines: bool = False):
        super().__init__(message if keep_lines else " ".join(message.split()))
        self.exit_code = exit_code


@contextlib.contextmanager
def user_errors(exit_code: int = 1) -> Iterator[None]:
    """Turns a ValueError of the library, which explains itself in one line, into a `CommandError`."""
    try:
        yield
    except ValueError as error:
        raise CommandError(str(error), exit_code) from error


@contextlib.contextmanager
def needed_libraries(extra: str = "evaluate") -> Iterator[None]:
    """Turns the absence of an optional library into a `CommandError` that says which extra to install."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] == __name__.partition(".")[0]:
            raise  # no library is missing, this package is broken
        reason = f"{error.name} is not installed" if error.name else str(error).strip().partition(". ")[0]
        raise CommandError(f'{reason}: pip install "proscale-hf[{extra}]"') from error


def quiet_libraries() -> None:
    """Silences the messages and progress bars of transformers and the Hub: what matters is said in one line here."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


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
