"""Short texts for messages: an error's first line, a few ids."""

from typing import Any


FEW = 10  # ids that an error message lists


def one_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def few(values: Any) -> str:
    """Ids for a message: sorted, numbers before texts, the first ten."""
    values = sorted(values, key=lambda value: (isinstance(value, str), value))
    shown = ", ".join(str(value) for value in values[:FEW])
    return f"[{shown}, ...]" if len(values) > FEW else f"[{shown}]"
