"""YAML that somebody else wrote: read as plain values, in time and memory that are in proportion to its length.

YAML lets a text use a part of itself many times (`*name`, `<<: *name`), and parts of parts, so a few lines can stand
for billions of values. Here a text is as long as it is with all parts written out; one that is too long is refused.
"""

import os
from collections.abc import Callable
from typing import Any

from proscale_hf.files.reading import read_bytes, reading
from proscale_hf.files.text import one_line, shown


try:
    import yaml
except ImportError as error:
    raise ImportError('YAML files need PyYAML: pip install "proscale-hf[train]"') from error

LARGEST_FILE = 2**18  # bytes; a full dump of detectron2 has 20,000
LARGEST_TEXT = 2 * LARGEST_FILE  # values and characters, with all parts written out
LONGEST_NUMBER = 100  # characters; Python takes long for longer ones
LONGEST_KEY = 15  # of whole numbers, since Python gives larger ones the hashes of smaller ones
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class PlainLoader(yaml.SafeLoader):
    """YAML's safe loader for texts of a bounded length, their parts written out."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _length(node, {})
        return node


def _length(node: yaml.Node, lengths: dict[yaml.Node, int | None]) -> int:
    """Number of values and characters below a node; raises if it is too large. `lengths` keeps what was counted."""
    if node in lengths:
        if lengths[node] is None:
            raise _error(node, "a value contains itself")
        return lengths[node]
    lengths[node] = None  # being counted
    length = 1
    if isinstance(node, yaml.ScalarNode):
        length += len(node.value)
        if node.tag in NUMBERS and len(node.value) > LONGEST_NUMBER:
            raise _error(node, "a number is too long")
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag in NUMBERS and len(key.value) > LONGEST_KEY:
                raise _error(key, "a number is too long for a key")
            length += _length(key, lengths) + _length(value, lengths)
    else:
        length += sum(_length(value, lengths) for value in node.value)
    if length > LARGEST_TEXT:
        raise _error(node, "it grows too long by using the same parts again and again")
    lengths[node] = length
    return length


def _error(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)


def read_yaml(
    path: str | os.PathLike, what: str, error_type: type[ValueError], loader: type[PlainLoader] = PlainLoader
) -> Any:
    """The values in a YAML file.

    Args:
        path: of the file, of at most `LARGEST_FILE` bytes.
        what: it is, for messages, such as "recipe".
        error_type: of the error.
        loader: makes values of it.

    Raises:
        ValueError: of `error_type`; one line that names the file, and the line in it where that is known.
    """
    with reading(path, "is no valid YAML", error_type, explain_yaml):
        return yaml.load(read_bytes(path, LARGEST_FILE, what), loader)


def explain_yaml(error: Exception) -> str:
    """What is wrong with a text, from what was raised over it: the line in it, if that is known, and the reason."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return (f"line {mark.line + 1}: " if mark else "") + (problem or one_line(error))


class Chain:
    """Files that start from other files, such as recipes with `base:`: how many were read, and in which order.

    Args:
        key: what a file has the names of the others under, for messages.
        error_type: of the error.
    """

    LONGEST = 30  # files

    def __init__(self, key: str, error_type: type[ValueError]):
        self.key = key
        self.error_type = error_type
        self.count = 0
        self.open: list[str] = []

    def follow(self, path: str | os.PathLike, read: Callable[[], Any]) -> Any:
        """What `read` returns, which reads a file, and follows the chain to the files that it starts from.

        Raises:
            ValueError: the file is one of those that start from it, or there are too many files.
        """
        with reading(path, "is no possible path", self.error_type):
            place = os.path.realpath(path)
        if place in self.open:
            cycle = " -> ".join(os.path.basename(name) for name in (*self.open[self.open.index(place) :], place))
            raise self.error_type(f"{path} is based on itself: {cycle}; take one {self.key} out")
        self.count += 1
        if self.count > self.LONGEST:
            raise self.error_type(f"{shown(self.open[0])} starts from more than {self.LONGEST} files by {self.key}")
        self.open.append(place)
        values = read()
        self.open.pop()
        return values
