"""Texts for messages are short and stay on their line, whatever they are made of."""

import pytest

from proscale_hf.files.text import few, one_line, printable, shown


def nested(levels):
    """A value of `9**levels` parts."""
    value = "lol"
    for _ in range(levels):
        value = [value] * 9
    return value


def ring():
    value = [1]
    value.append(value)
    return value


@pytest.mark.parametrize(
    "value",
    [nested(50), ring(), 10**50_000, "ä" * 10**6, b"\0" * 500, dict.fromkeys(range(10**5)), {1: {2: {3: {}}}}],
    ids=["nested", "ring", "number", "text", "bytes", "keys", "levels"],
)
def test_shown_is_short(value):
    assert len(shown(value)) <= 110


def test_shown_is_readable():
    for value in ("Bär", 1.5, None, True, (1, "a"), ["x", {"y": 2}], -(10**20)):
        assert shown(value) == repr(value)
    assert shown("\x1b[31m\nä") == r"'\x1b[31m\nä'"


def test_printable():
    assert printable("Bär") == "Bär"
    assert printable("\x1b[31m\n\udcff\u202e") == r"\x1b[31m\n\udcff\u202e"
    assert printable("a" * 101) == "a" * 100 + "..."
    assert printable("\0" * 50) == r"\x00" * 25 + "..."


def test_lines_and_lists():
    assert one_line(ValueError(" a\nb")) == "a"
    assert one_line(KeyError()) == "KeyError"
    assert few([3, "b", 1]) == "[1, 3, b]"
    assert few(range(12)) == "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...]"
