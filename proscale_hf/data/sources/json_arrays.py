"""One entry at a time from large JSON files: COCO's annotations are 450 MB of text, and GBs as Python objects."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from proscale_hf.files.reading import open_file
from proscale_hf.files.text import one_line


CHUNK = 2**20  # bytes
SPACE = " \t\r\n"


class Entry(NamedTuple):
    """An entry of an array, and where its text is."""

    value: Any
    start: int
    length: int


def read_array(path: str | Path, key: str, is_needed: bool = True) -> Iterator[Entry]:
    """
    The entries of an array at the top level of a JSON object. What stands after the array is not read.

    Args:
        path: JSON file, UTF-8.
        key: of the array in the file's outermost object.
        is_needed: whether a file without such an array is an error.

    Yields:
        entries with their places in the file, in bytes.

    Raises:
        ValueError: the file cannot be read, is no JSON object, or has no such array; one line.
    """
    with open_file(path) as file:
        try:
            yield from _Reader(file).entries(key, is_needed)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
        except RecursionError:
            raise ValueError(f"{path} is no valid JSON: too many brackets inside each other.") from None
        except ValueError as error:
            raise ValueError(f"{path}: {one_line(error)}") from error


class _Reader:
    """Walks through the text, of which it holds little more than one value.

    Bytes are taken for Latin-1, so that a character is a byte and nothing can be cut in two; all that structures JSON
    is ASCII. Values with other characters are decoded again.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.dropped = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0  # some editors begin with it
        file.seek(self.dropped)
        self.text, self.position = "", 0
        self.at_end = False
        self.decoder = json.JSONDecoder()

    def entries(self, key: str, is_needed: bool) -> Iterator[Entry]:
        if self._next() != "{":
            raise ValueError("it must be a JSON object, which begins with {.")
        self.position += 1
        while self._next() != "}":
            found = self._value().value
            self._expect(":")
            if self._next() == "[":
                entries = self._array()
                if found == key:
                    yield from entries
                    return
                for _ in entries:
                    pass
            else:
                self._value()
            self._separator("}")
        if is_needed:
            raise ValueError(f'the file has no array "{key}".')

    def _array(self) -> Iterator[Entry]:
        self._expect("[")
        while self._next() != "]":
            yield self._value()
            self._separator("]")
        self.position += 1

    def _value(self) -> Entry:
        self._next()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
                if end < len(self.text) or self.at_end:  # else it may be the first part of a number
                    break
            except json.JSONDecodeError as error:
                if self.at_end:
                    place = self.dropped + error.pos
                    raise ValueError(f"it is no valid JSON: {error.msg} at byte {place}.") from None
            self._read_on()
        start, text = self.dropped + self.position, self.text[self.position : end]
        self.position = end
        return Entry(value if text.isascii() else json.loads(text.encode("latin-1")), start, len(text))

    def _next(self) -> str:
        """Goes on to the next character that is no space; empty at the end of the file."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in SPACE:
                self.position += 1
            if self.position < len(self.text) or self.at_end:
                return self.text[self.position : self.position + 1]
            self._read_on()

    def _expect(self, character: str) -> None:
        if self._next() != character:
            raise ValueError(f"it is no valid JSON: there is no {character} at byte {self.dropped + self.position}.")
        self.position += 1

    def _separator(self, closing: str) -> None:
        if self._next() != closing:
            self._expect(",")

    def _read_on(self) -> None:
        # Twice as much each time: a value that is larger than a chunk is not parsed again too often.
        rest = self.text[self.position :]
        chunk = self.file.read(max(CHUNK, len(rest)))
        self.dropped += self.position
        self.text, self.position, self.at_end = rest + chunk.decode("latin-1"), 0, not chunk
