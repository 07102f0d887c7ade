"""Reads the two formats of `torch.save`, without torch's own reader.

The file's main pickle is read by `pickle_machine`, and what it says about storages (the numbers of tensors) is compared
with the bytes that the file has for them. The numbers are then read from just these places, so nothing is read that was
not checked. A storage is read once, and only if one of its tensors is asked for.
"""

import io
import math
import mmap
import pickle
import sys
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from proscale_hf.convert.pickle_machine import Named, RefusedPickleError, Settings, dict_of, read_pickle
from proscale_hf.files.text import printable


ZIP_END, LARGE_ZIP_END, LOCAL_HEADER = b"PK\x05\x06", b"PK\x06\x06", b"PK\x03\x04"
OLD_TORCH_NUMBERS = (0x1950A86A20F9469CFC6C, 1001)  # the format and its version
OLD_TORCH_START = pickle.dumps(OLD_TORCH_NUMBERS[0], protocol=2)
MAXIMUM_DIMENSIONS = 64  # of a tensor in torch and numpy
MAXIMUM_ZIP_DIRECTORY = 2**22  # bytes; about 90 for each storage
ENCRYPTED = 1  # flag of a part in a zip file
OVERLAP = 2  # how often the numbers of a storage may be used, by tensors of other shapes or places
SMALL = 1000  # elements that may be used more often
WEIGHT_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class BoundedFile:
    """A file that never reads more bytes than it has: Python makes room for all that is asked for before it reads."""

    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.size = size
        self.readline, self.readinto, self.seek, self.tell = file.readline, file.readinto, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        left = self.size - self.tell()
        return self.file.read(left if size < 0 else min(size, left))


class Numbers:
    """The numbers in a file.

    Args:
        file: where they are.
        mapped: they are mapped, not read, where that is possible. Not so those of 16 bits: as they will be converted,
            their memory should be free again afterwards.
        byte_order: of the numbers, "little" or "big".
    """

    def __init__(self, file: BoundedFile, mapped: bool = False, byte_order: str = "little"):
        self.file = file
        self.mapping = mmap.mmap(file.file.fileno(), 0, access=mmap.ACCESS_COPY) if mapped else None
        self.is_swapped = byte_order != sys.byteorder

    def read(self, dtype: torch.dtype, length: int, start: int) -> Tensor:
        """(length,) numbers, from a place in the file."""
        if not length:
            return torch.empty(0, dtype=dtype)
        if self.mapping is not None and dtype.itemsize != 2 and start % dtype.itemsize == 0:
            numbers = torch.frombuffer(self.mapping, dtype=dtype, count=length, offset=start)
        else:
            numbers = torch.empty(length, dtype=dtype)
            self.file.seek(start)
            if self.file.readinto(numbers.view(torch.uint8).numpy()) != numbers.nbytes:
                raise EOFError
        if self.is_swapped and dtype.itemsize > 1:
            numbers.untyped_storage().byteswap(dtype)
        return numbers


class Storage:
    """The numbers of one or several tensors: first as a pickle describes them, and then with their place in a file."""

    def __init__(self, dtype: torch.dtype, length: int):
        self.dtype = dtype
        self.length = length
        self.numbers: Numbers | None = None
        self.start = 0
        self.content: Tensor | None = None
        self.tensors: dict[tuple, Tensor] = {}
        self.used = 0

    def tensor(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """A tensor on these numbers; the same one whenever the same is asked for."""
        view = offset, shape, strides
        if view not in self.tensors:
            self.used += math.prod(shape)
            if self.used > OVERLAP * self.length + SMALL:
                raise RefusedPickleError("it has very many tensors that overlap")
            if self.content is None:
                self.content = self.numbers.read(self.dtype, self.length, self.start)
            self.tensors[view] = self.content.as_strided(shape, strides, offset)
        return self.tensors[view]


class DescribedTensor:
    """A tensor of a torch file, read when it is asked for."""

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any):
        if not isinstance(storage, Storage):
            raise TypeError("a storage expected")
        check_view(storage.length, offset, shape, strides)
        self.storage, self.offset, self.shape, self.strides = storage, offset, tuple(shape), tuple(strides)

    def tensor(self) -> Tensor:
        return self.storage.tensor(self.offset, self.shape, self.strides)


def check_sizes(*sizes: Any) -> None:
    """Raise if these cannot be sizes of a tensor: too many, or numbers that torch cannot hold."""
    if len(sizes) > MAXIMUM_DIMENSIONS or not all(type(size) is int and abs(size) < 2**63 for size in sizes):
        raise TypeError("no sizes of a tensor")


def check_view(length: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Raise if a tensor is not a part of a storage of `length` elements."""
    check_sizes(*shape)
    check_sizes(*strides)
    check_sizes(offset)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    inside = last < length and math.prod(shape) <= length
    if min(offset, *shape, *strides, 0) < 0 or not (inside or 0 in shape):
        view = f"shape {printable(str(shape))}, strides {printable(str(strides))} and offset {offset}"
        raise RefusedPickleError(f"it has a tensor of {view} in a storage of {length} elements")


def encode_latin1(text: str, encoding: str) -> bytes:
    """What a pickle writes bytes as in versions before 3."""
    if encoding != "latin1":
        raise ValueError("bytes in another encoding")
    return text.encode("latin1")


COMMON_MEANINGS = {"collections.OrderedDict": dict_of, "_codecs.encode": encode_latin1}
TORCH_MEANINGS = {
    **COMMON_MEANINGS,
    "argparse.Namespace": Settings,  # how a model was trained
    "collections.Counter": lambda counts: dict_of(counts.items()),
    "torch._utils._rebuild_tensor": DescribedTensor,
    "torch._utils._rebuild_tensor_v2": DescribedTensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    **{f"torch.{name}": dtype for name, dtype in WEIGHT_DTYPES.items()},
}


def _describe(file: Any) -> tuple[Any, dict[str, Storage]]:
    """Content of a torch file's main pickle, with tensors only described, and its storages by key."""
    storages: dict[str, Storage] = {}

    def describe_storage(persistent_id: Any) -> Storage:
        if not isinstance(persistent_id, tuple) or len(persistent_id) not in (5, 6):
            raise RefusedPickleError("it holds something that is no storage of numbers")
        what, kind, key, _, length, *view = persistent_id
        check_sizes(length)
        dtype = kind.meaning if isinstance(kind, Named) else None
        is_plain = isinstance(key, str) and isinstance(what, str) and all(part is None for part in view)
        if not is_plain or what != "storage" or not isinstance(dtype, torch.dtype) or length < 0:
            raise RefusedPickleError("it holds something that is no storage of numbers")
        storage = storages.setdefault(key, Storage(dtype, length))
        if (storage.dtype, storage.length) != (dtype, length):
            raise RefusedPickleError(f"it describes the storage {printable(key)} in two ways")
        return storage

    return read_pickle(file, TORCH_MEANINGS, describe_storage), storages


def _locate(storages: Mapping[str, Storage], places: Mapping[str, tuple[int, int]], numbers: Numbers) -> None:
    """Give the storages their places, as (start, bytes); raise if the file has fewer bytes than the pickle claims."""
    for key, storage in storages.items():
        storage.numbers = numbers
        storage.start, found = places.get(key, (0, 0))
        claimed = storage.length * storage.dtype.itemsize
        if claimed > found:
            raise RefusedPickleError(f"it claims {claimed} bytes for the storage {printable(key)}, and has {found}")


def read_torch_zip(file: BoundedFile) -> Any:
    """
    Read a file in torch's zip format.

    Args:
        file: a regular file; its tensors are mapped.

    Returns:
        The content, with tensors as `DescribedTensor`.

    Raises:
        RefusedPickleError: the file is none that `torch.save` writes.
        Exception: of any type, if the file is damaged.
    """
    file.seek(max(0, file.size - 98))
    end = file.read(98).rjust(98, b"\0")
    if end[76:80] != ZIP_END:
        raise EOFError
    # The size of the zip's directory, in the last record and in the one for large files, two records earlier.
    directory_size = int.from_bytes(end[88:92], "little")
    if end.startswith(LARGE_ZIP_END):
        directory_size = max(directory_size, int.from_bytes(end[40:48], "little"))
    if directory_size > MAXIMUM_ZIP_DIRECTORY:
        raise RefusedPickleError(f"the directory of this zip file claims {directory_size} bytes")
    with zipfile.ZipFile(file.file) as archive:
        parts = archive.infolist()
    entries = {entry.filename: entry for entry in parts}
    if any(name.endswith("/constants.pkl") for name in entries):
        raise RefusedPickleError("it is a TorchScript program, not a state dict")
    for name, entry in entries.items():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise RefusedPickleError(f"its part {printable(name)} is compressed, which torch never does")
    claimed = sum(entry.file_size for entry in parts)
    if claimed > file.size or len(entries) < len(parts):
        raise RefusedPickleError(f"its parts overlap: they have {claimed} bytes, and the file {file.size}")
    roots = {name.partition("/")[0] for name in entries}
    if len(roots) > 1 or f"{min(roots, default='')}/data.pkl" not in entries:
        raise RefusedPickleError("this zip file was not written by torch.save")
    places = {name.partition("/")[2]: _place(file, entry) for name, entry in entries.items()}
    byte_order = _part(file, *places["byteorder"]).decode() if "byteorder" in places else "little"
    content, storages = _describe(io.BytesIO(_part(file, *places["data.pkl"])))
    in_data = {name.removeprefix("data/"): place for name, place in places.items() if name.startswith("data/")}
    _locate(storages, in_data, Numbers(file, mapped=True, byte_order=byte_order))
    return content


def _place(file: BoundedFile, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of a part begin, and how many they are; only its own header says how long that is itself."""
    file.seek(entry.header_offset)
    header = file.read(30)
    name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    start = entry.header_offset + 30 + name_length + extra_length
    if not header.startswith(LOCAL_HEADER) or entry.flag_bits & ENCRYPTED or start + entry.file_size > file.size:
        raise EOFError
    return start, entry.file_size


def _part(file: BoundedFile, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def read_old_torch(file: BoundedFile) -> Any:
    """
    Read a file in torch's format before version 1.6.

    Returns:
        The content, with tensors as `DescribedTensor`.

    Raises:
        RefusedPickleError: the file claims more than it has.
        Exception: of any type, if the file is damaged.
    """
    for expected in OLD_TORCH_NUMBERS:
        number = read_pickle(file, {})
        if type(number) is not int or number != expected:
            raise ValueError("another format")
    read_pickle(file, {})  # the writer's byte order; numbers are little-endian whatever it is
    content, storages = _describe(file)
    places = {}
    for key in read_pickle(file, {}):
        if not isinstance(key, str):
            raise TypeError("a name expected")
        storage, length = storages[key], int.from_bytes(file.read(8), "little")
        if length != storage.length:
            raise RefusedPickleError(f"it has {length} elements for a storage of {storage.length}")
        start = file.tell()
        places[key] = start, min(length * storage.dtype.itemsize, file.size - start)
        file.seek(sum(places[key]))
    _locate(storages, places, Numbers(file))
    return content
