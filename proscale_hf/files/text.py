"""Short texts for messages: an error's first line, a few ids, a value of a file."""

import reprlib
from typing import Any


FEW = 10  # ids that an error message lists
LONGEST_VALUE = 100  # characters


def one_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def few(values: Any) -> str:
    """Ids for a message: sorted, numbers before texts, the first ten."""
    values = sorted(values, key=lambda value: (isinstance(value, str), value))
    shown = ", ".join(str(value) for value in values[:FEW])
    return f"[{shown}, ...]" if len(values) > FEW else f"[{shown}]"


def escaped(text: str) -> str:
    """A text with escape sequences in place of what a terminal cannot show, or would take for a command."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def printable(text: str, longest: int = LONGEST_VALUE) -> str:
    """A text from an untrusted file as a short part of a line."""
    line = escaped(text[:longest])
    return f"{line[:longest]}..." if len(text) > longest or len(line) > longest else line


def shown(value: Any) -> str:
    """A value from an untrusted file as a short part of a line, whatever it holds, itself perhaps."""
    return printable(_SHORT.repr(value))


class _Short(reprlib.Repr):
    """Shows the first parts of a value, and of these the first parts, so that the work has a bound."""

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() < 200 else f"a number of {value.bit_length()} bits"

    def repr_str(self, value: str, level: int) -> str:
        return repr(value[:LONGEST_VALUE])

    repr_bytes = repr_str


_SHORT = _Short()
_SHORT.maxlevel = 3
