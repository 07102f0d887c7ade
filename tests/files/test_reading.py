"""Files of others: regular ones are opened, and whatever goes wrong in them is one line that names the file."""

import errno
import os

import pytest
import torch

from proscale_hf.files.memory import is_out_of_memory
from proscale_hf.files.reading import FileError, open_file, read_bytes, reading


class OwnError(ValueError):
    pass


def test_regular_file(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    with open_file(tmp_path / "file") as file:
        assert file.read() == b"content"
    assert read_bytes(tmp_path / "file", most=7) == b"content"
    with pytest.raises(FileError, match=r"file is larger than the 6 bytes"):
        read_bytes(tmp_path / "file", most=6)


def test_other_things(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, what in (
        (tmp_path, "is a folder, not a picture"),
        (tmp_path / "pipe", "is a device or pipe, not a picture"),
        ("/dev/zero", "is a device or pipe, not a picture"),
        (tmp_path / "none", "there is no picture .*; check the path"),
        (tmp_path / "none" / "file", "there is no picture .*; check the path"),
        (tmp_path / ("x" * 300), "cannot be opened"),
        ("a\0b", r"a\\x00b cannot be opened"),
        ("a\nb", r"no picture a\\nb; check the path"),
    ):
        with pytest.raises(FileError, match=what):
            read_bytes(path, most=10, what="picture")


@pytest.mark.parametrize(
    "error", [ValueError("a\nb"), RecursionError("a"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a"), KeyError("a")]
)
def test_whatever_is_raised_names_the_file(error):
    for error_type in (FileError, OwnError):
        with (
            pytest.raises(error_type, match=r"^x\.json is no valid JSON: [^\n]*a") as caught,
            reading("x.json", "is no valid JSON", error_type),
        ):
            raise error
        assert caught.value.__cause__ is error


def test_what_is_explained_already_stays():
    for error in (OwnError("mine"), FileError("mine")):
        with pytest.raises(OwnError, match=r"^mine$"), reading("x.json", error_type=OwnError):
            raise error
    with pytest.raises(KeyboardInterrupt), reading("x.json"):
        raise KeyboardInterrupt
    with pytest.raises(FileError, match=r"not enough memory to read x\.json"), reading("x.json"):
        raise MemoryError


def test_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(ValueError("out of memory"))
