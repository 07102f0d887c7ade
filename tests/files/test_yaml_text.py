"""YAML is read as plain values, and what would grow without bound is refused in one line."""

import datetime
import os
from functools import partial
from itertools import pairwise

import pytest

from proscale_hf.files.yaml_text import LARGEST_FILE, Chain, read_yaml


class OwnError(ValueError):
    pass


def read(tmp_path, text):
    (tmp_path / "file.yaml").write_text(text)
    return read_yaml(tmp_path / "file.yaml", "recipe", OwnError)


def powers(pattern):
    """Twenty lines, each of which has the line before nine times."""
    names = "abcdefghijklmnopqrst"
    lines = [f"{names[0]}: &{names[0]} {{x: 1}}"]
    for below, name in pairwise(names):
        lines.append(f"{name}: &{name} " + pattern.format(", ".join([f"*{below}"] * 9)))
    return "\n".join(lines)


def test_plain_values(tmp_path):
    text = "a: &a {x: 1, y: [2, 1.5]}\nb: *a\nc: {<<: *a, x: 3}\nd: 2024-02-29\n7: ä"
    a = {"x": 1, "y": [2, 1.5]}
    expected = {"a": a, "b": a, "c": {"x": 3, "y": [2, 1.5]}, "d": datetime.date(2024, 2, 29), 7: "ä"}
    assert read(tmp_path, text) == expected
    assert read(tmp_path, "") is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (powers("[{}]"), "line 7: it grows too long by using the same parts"),
        (powers("{{<<: [{}]}}"), "line 7: it grows too long by using the same parts"),
        (f"a: &a {'x' * 10_000}\nb: [{'*a,' * 100}]", "line 2: it grows too long"),
        ("a: &a [*a]", "line 1: a value contains itself"),
        ("a: 1" + ":1" * 50_000, "line 1: a number is too long"),
        ("{" + ", ".join(f"{number * (2**61 - 1)}: 1" for number in range(9000)) + "}", "too long for a key"),
        ("[" * 1500, "maximum recursion depth"),
        ("a: !!python/object/apply:os.getcwd []", "line 1: could not determine a constructor"),
        ("a: 2000-99-99", "month must be in"),
        ("a: !!bool x", "'x'"),
        ("a: [1\nb: 2", "line 2: "),
        ("a: \0", "special characters are not allowed"),
    ],
    ids=["lists", "merged", "text", "ring", "number", "keys", "deep", "python", "date", "bool", "syntax", "control"],
)
def test_refused(tmp_path, text, problem):
    with pytest.raises(OwnError, match=f"file.yaml is no valid YAML: .*{problem}") as error:
        read(tmp_path, text)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(OwnError, match=f"larger than the {LARGEST_FILE:,} bytes that a recipe may have"):
        read(tmp_path, " " * (LARGEST_FILE + 1))
    (tmp_path / "file.yaml").write_bytes(b"a: \xff")
    with pytest.raises(OwnError, match="no valid YAML"):
        read_yaml(tmp_path / "file.yaml", "recipe", OwnError)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(OwnError, match="is a device or pipe, not a recipe"):
        read_yaml(tmp_path / "pipe.yaml", "recipe", OwnError)


def test_chain(tmp_path):
    """Files may be read twice, but not as their own base, and not very many of them."""
    chain = Chain("`base:`", OwnError)
    assert chain.follow("a", lambda: [chain.follow("b", lambda: 1), chain.follow("b", lambda: 2)]) == [1, 2]
    with pytest.raises(OwnError, match=r"a is based on itself: a -> b -> a; take one `base:` out"):
        chain.follow("a", lambda: chain.follow("b", lambda: chain.follow("./a", lambda: 1)))

    def endless(chain, number):
        return chain.follow(str(number), partial(endless, chain, number + 1))

    with pytest.raises(OwnError, match=r"starts from more than 30 files by `base:`"):
        endless(Chain("`base:`", OwnError), 0)
