"""Reads the weights in a checkpoint without running code from it.

A pickle may name any function, and reading the pickle calls it. Here every pickle in a file is first read by
`pickle_machine`, which calls only the functions below. The first bytes of a file say what it is, not its suffix:

- torch's zip format and torch's older format (`.pth`) are looked through first: tensors are only described, and
  compared with the bytes that the file has for them. Then `torch.load(weights_only=True)` reads the file;
- a plain pickle (`.pkl`, the detectron2 model zoo) of numpy arrays or tensors;
- safetensors, which hold no pickle.
"""

import io
import math
import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from proscale_hf.convert import ConversionError
from proscale_hf.convert.pickle_machine import RefusedPickleError, Stateful, dict_of, printable, read_pickle


ZIP_START, ZIP_END, LARGE_ZIP_END = b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06"
OLD_TORCH_NUMBERS = (0x1950A86A20F9469CFC6C, 1001)  # the format and its version
OLD_TORCH_START = pickle.dumps(OLD_TORCH_NUMBERS[0], protocol=2)
PLAIN_PICKLE_STARTS = b"\x80(}]c"  # the version, or the first operation of a container in versions 0 and 1
MAXIMUM_DIMENSIONS = 64  # of a tensor in torch and numpy
MAXIMUM_ZIP_DIRECTORY = 2**22  # bytes; about 90 for each storage
KNOWN_STARTS = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the file it stands for; run `git lfs pull` to get that"),
    (b"<", "is a web page, not a checkpoint; the download needs another address, or a login"),
    (b"\x1f\x8b", "is compressed with gzip; decompress it first"),
)
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


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """
    Load the state dict of a checkpoint, bare or wrapped in `"model"`, without running code from the file.

    Args:
        path: A `.pth` (zip or older torch format), `.pkl` (plain pickle of arrays or tensors) or `.safetensors` file.

    Returns:
        Tensors by name, on the CPU, in the file's dtypes, all numbers finite. Other contents of the file, such as
        an optimizer's state, are left out. Tensors of a zip file are mapped, not read. A file with 16-bit tensors is
        read, so that their memory is free again once they are converted.

    Raises:
        ConversionError: the file is missing or damaged, calls something that weights do not need, claims more
            data than it has, or holds no state dict.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the readers warn about files that are refused here in one line
            return _state_dict(path, _read(path))
    except RefusedPickleError as error:
        raise ConversionError(f"{path} is refused: {error}.") from error
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or error}.") from error
    except MemoryError as error:
        raise ConversionError(f"There is not enough memory to read {path}.") from error
    except ConversionError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise ConversionError(f"{path} is damaged, or no checkpoint in torch's or pickle's format.") from error


def _read(path: Path) -> Any:
    """The content of the file; its tensors are torch's or `PickledArray`."""
    if not path.exists():
        raise ConversionError(f"There is no checkpoint file {path}.")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ConversionError(f"{path} is a {'folder' if path.is_dir() else 'device or pipe'}, not a checkpoint file.")
    if not status.st_size:
        raise ConversionError(f"{path} is damaged: it is empty.")
    with path.open("rb") as opened:
        file = BoundedFile(opened, status.st_size)
        start = file.read(100)
        file.seek(0)
        for known_start, meaning in KNOWN_STARTS:
            if start.lstrip().startswith(known_start):
                raise ConversionError(f"{path} {meaning}.")
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < status.st_size:
            return safetensors.torch.load_file(path)
        if start.startswith(ZIP_START):
            content = _look_through_zip(file)
            read_at_once = any(
                isinstance(value, TensorDescription) and value.dtype.itemsize == 2
                for value in _named_values(content).values()
            )
            return torch.load(path, map_location="cpu", weights_only=True, mmap=not read_at_once)
        if start.startswith(OLD_TORCH_START):
            _look_through_old_torch(file)
            return torch.load(path, map_location="cpu", weights_only=True)
        if start[0] in PLAIN_PICKLE_STARTS:
            return read_pickle(file, PLAIN_PICKLE_MEANINGS)
        raise ValueError("no known format")


class BoundedFile:
    """A file that never reads more bytes than it has: Python makes room for all that is asked for before it reads."""

    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.size = size
        self.readline, self.seek, self.tell = file.readline, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        left = self.size - self.tell()
        return self.file.read(left if size < 0 else min(size, left))


class Storage(NamedTuple):
    """What a pickle says about the numbers of one or several tensors."""

    dtype: torch.dtype
    length: int


class TensorDescription(NamedTuple):
    """A tensor of a torch file, before it is read."""

    dtype: torch.dtype


def _check_sizes(*sizes: Any) -> None:
    """Raise if these cannot be sizes of a tensor: too many, or numbers that torch cannot hold."""
    if len(sizes) > MAXIMUM_DIMENSIONS or not all(type(size) is int and abs(size) < 2**63 for size in sizes):
        raise TypeError("no sizes of a tensor")


def _check_view(length: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Raise if a tensor is not a part of a storage of `length` elements."""
    _check_sizes(*shape)
    _check_sizes(*strides)
    _check_sizes(offset)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    inside = last < length and math.prod(shape) <= length
    if min(offset, *shape, *strides, 0) < 0 or not (inside or 0 in shape):
        raise RefusedPickleError(
            f"it has a tensor of shape {shape}, strides {strides} and offset {offset} in a storage of {length} elements"
        )


def _describe_tensor(storage: Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> TensorDescription:
    _check_view(storage.length, offset, shape, strides)
    return TensorDescription(storage.dtype)


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


COMMON_MEANINGS = {"collections.OrderedDict": dict_of, "_codecs.encode": _encode_latin1}
TORCH_MEANINGS = {
    **COMMON_MEANINGS,
    "collections.Counter": lambda counts: dict_of(counts.items()),
    "torch._utils._rebuild_tensor": _describe_tensor,
    "torch._utils._rebuild_tensor_v2": _describe_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    **{f"torch.{name}": dtype for name, dtype in WEIGHT_DTYPES.items()},
}


def _describe(file: Any) -> tuple[Any, dict[str, Storage]]:
    """Content of a torch file's main pickle, with tensors only described, and its storages by key."""
    storages: dict[str, Storage] = {}

    def describe_storage(persistent_id: Any) -> Storage:
        what, kind, key, _, length, *view = persistent_id
        _check_sizes(length)
        if what != "storage" or not isinstance(key, str) or length < 0 or view not in ([], [None]):
            raise RefusedPickleError("it holds something that is no storage of numbers")
        storage = Storage(kind.meaning, length)
        if storages.setdefault(key, storage) != storage:
            raise RefusedPickleError(f"it describes the storage {printable(key)} in two ways")
        return storage

    return read_pickle(file, TORCH_MEANINGS, describe_storage), storages


def _check_storages(storages: Mapping[str, Storage], available: Mapping[str, int]) -> None:
    """Raise if the file has fewer bytes for a storage than the pickle claims."""
    for key, storage in storages.items():
        claimed, found = storage.length * storage.dtype.itemsize, available.get(key, 0)
        if claimed > found:
            raise RefusedPickleError(f"it claims {claimed} bytes for the storage {printable(key)}, and has {found}")


def _look_through_zip(file: BoundedFile) -> Any:
    """Content of a file in torch's zip format, with tensors only described; raises if anything is wrong with it."""
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
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(name.endswith("/constants.pkl") for name in entries):
            raise RefusedPickleError("it is a TorchScript program, not a state dict")
        for name, entry in entries.items():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise RefusedPickleError(f"its part {printable(name)} is compressed, which torch never does")
        claimed = sum(entry.file_size for entry in archive.infolist())
        if claimed > file.size or len(entries) < len(archive.infolist()):
            raise RefusedPickleError(f"its parts overlap: they have {claimed} bytes, and the file {file.size}")
        roots = {name.partition("/")[0] for name in entries}
        if len(roots) > 1 or f"{min(roots, default='')}/data.pkl" not in entries:
            raise RefusedPickleError("this zip file was not written by torch.save")
        root = roots.pop()
        content, storages = _describe(io.BytesIO(archive.read(f"{root}/data.pkl")))
    sizes = {name.removeprefix(f"{root}/data/"): entry.file_size for name, entry in entries.items()}
    _check_storages(storages, sizes)
    return content


def _look_through_old_torch(file: BoundedFile) -> Any:
    """Content of a file in torch's older format, with tensors only described; raises if anything is wrong with it."""
    for expected in OLD_TORCH_NUMBERS:
        if read_pickle(file, {}) != expected:
            raise ValueError("another format")
    read_pickle(file, {})  # the writer's byte order
    content, storages = _describe(file)
    available = {}
    for key in read_pickle(file, {}):
        if not isinstance(key, str):
            raise TypeError("a name expected")
        length = int.from_bytes(file.read(8), "little")
        if length != storages[key].length:
            raise RefusedPickleError(f"it has {length} elements for a storage of {storages[key].length}")
        available[key] = min(length * storages[key].dtype.itemsize, file.size - file.tell())
        file.seek(available[key], io.SEEK_CUR)
    _check_storages(storages, available)
    return content


class PickledDtype(Stateful):
    """The data type of a pickled array, by numpy's code: `f4`."""

    def __init__(self, code: str, *_: Any):
        self.code = code
        self.byte_order = "|"

    def set_state(self, state: tuple) -> None:
        self.byte_order = state[1]

    def numpy_dtype(self) -> np.dtype | None:
        """The type in numpy; None if weights cannot have it."""
        name = self.byte_order + self.code
        return np.dtype(name) if re.fullmatch(r"[<>=|][biuf][1248]", name) else None


class PickledArray(Stateful):
    """A pickled array; `data` holds the bytes of its elements, or for some types a list of objects."""

    def __init__(self, *_: Any):
        self.shape, self.dtype, self.column_major, self.data = (0,), PickledDtype("b1"), False, b""

    def set_state(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.column_major, self.data = state  # the first is the state's version

    def tensor(self) -> Tensor | None:
        """A copy in the machine's byte order; None if the array holds no numbers."""
        dtype = self.dtype.numpy_dtype()
        if dtype is None:
            return None
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data  # text: from Python 2
        _check_sizes(*self.shape)
        if min(self.shape, default=0) < 0 or math.prod(self.shape) * dtype.itemsize != len(data):
            raise RefusedPickleError(f"it has an array of shape {self.shape} with {len(data)} bytes of data")
        array = np.ndarray(self.shape, dtype, data, order="F" if self.column_major else "C")
        return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C"))


def _array_from_buffer(data: bytes, dtype: PickledDtype, shape: tuple, order: str) -> PickledArray:
    array = PickledArray()
    array.set_state((1, shape, dtype, order == "F", data))
    return array


class NestedStorage(NamedTuple):
    """A storage in a plain pickle of a tensor, where it is the bytes of a file in torch's older format."""

    description: Storage
    storage: torch.TypedStorage


def _read_nested_storage(data: bytes) -> NestedStorage:
    description = _look_through_old_torch(BoundedFile(io.BytesIO(data), len(data)))
    if not isinstance(description, Storage):
        raise TypeError("a storage expected")
    return NestedStorage(description, torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))


def _rebuild_tensor(nested: NestedStorage, offset: int, shape: tuple, strides: tuple, *_: Any) -> Tensor:
    _check_view(nested.description.length, offset, shape, strides)
    return torch._utils._rebuild_tensor(nested.storage, offset, shape, strides)


PLAIN_PICKLE_MEANINGS = {
    **COMMON_MEANINGS,
    "numpy.dtype": PickledDtype,
    "numpy.ndarray": "the class of the array",
    "numpy.core.multiarray._reconstruct": PickledArray,
    "numpy.core.numeric._frombuffer": _array_from_buffer,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.storage._load_from_bytes": _read_nested_storage,
}


def _named_values(content: Any) -> dict[Any, Any]:
    """The entries of the state dict in a file's content; none if there is no state dict."""
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    return content if isinstance(content, dict) else {}


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    values = _named_values(content)
    if not values:
        raise ConversionError(f"{path} holds no state dict, neither at the top nor under 'model'.")
    state: dict[str, Tensor] = {}
    others, not_finite = [], []
    for name in list(values):
        value = values.pop(name)  # the memory of an array is free again once its tensor is made
        if isinstance(value, PickledArray):
            value = value.tensor()
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.dtype not in WEIGHT_DTYPES.values():
            others.append(str(name))
            continue
        state[name] = value.detach()
        if value.is_floating_point() and value.numel() and not torch.stack(value.aminmax()).isfinite().all():
            not_finite.append(name)
    if others:
        raise ConversionError(f"{path} holds entries that are no tensors: {_listed(others)}.")
    if not_finite:
        raise ConversionError(f"{path} holds weights that are infinite or no numbers: {_listed(not_finite)}.")
    return state


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(printable, names[:10])) + more
