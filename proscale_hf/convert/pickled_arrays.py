"""Reads plain pickles of numpy's arrays, or of tensors, as the detectron2 model zoo has them."""

import io
import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from proscale_hf.convert.pickle_machine import RefusedPickleError, Stateful, read_pickle
from proscale_hf.convert.torch_files import (
    COMMON_MEANINGS,
    BoundedFile,
    DescribedTensor,
    Storage,
    check_sizes,
    read_old_torch,
)
from proscale_hf.files.text import printable


class PickledDtype(Stateful):
    """The data type of a pickled array, by numpy's code: `f4`."""

    __slots__ = ("byte_order", "code")

    def __init__(self, code: str, *_: Any):
        self.code = code
        self.byte_order = "|"

    def set_state(self, state: tuple) -> None:
        self.byte_order = state[1]

    def numpy_dtype(self) -> np.dtype | None:
        """The type in numpy; None if weights cannot have it."""
        name = self.byte_order + self.code
        return np.dtype(name) if re.fullmatch(r"[<>=|][biuf][1248]", name) else None


BYTES = PickledDtype("b1")


class PickledArray(Stateful):
    """A pickled array; `data` holds the bytes of its elements, or for some types a list of objects."""

    __slots__ = ("column_major", "data", "dtype", "made", "shape")

    def __init__(self, *_: Any):
        self.shape, self.dtype, self.column_major, self.data = (0,), BYTES, False, b""
        self.made: Tensor | None = None

    def set_state(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.column_major, self.data = state  # the first is the state's version

    def tensor(self) -> Tensor | None:
        """A copy in the machine's byte order, the same one each time; None if the array holds no numbers."""
        dtype = self.dtype.numpy_dtype()
        if dtype is None or self.made is not None:
            return self.made
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data  # text: from Python 2
        check_sizes(*self.shape)
        if min(self.shape, default=0) < 0 or math.prod(self.shape) * dtype.itemsize != len(data):
            shape = printable(str(self.shape))
            raise RefusedPickleError(f"it has an array of shape {shape} with {len(data)} bytes of data")
        array = np.ndarray(self.shape, dtype, data, order="F" if self.column_major else "C")
        self.made = torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C"))
        self.data = b""  # its memory is free again, unless another array has the same
        return self.made


def array_from_buffer(data: bytes, dtype: PickledDtype, shape: tuple, order: str) -> PickledArray:
    """An array as version 5 of pickle has it."""
    array = PickledArray()
    array.set_state((1, shape, dtype, order == "F", data))
    return array


def nested_storage(data: bytes) -> Storage:
    """A storage in a plain pickle of a tensor, where it is the bytes of a file in torch's older format."""
    storage = read_old_torch(BoundedFile(io.BytesIO(data), len(data)))
    if not isinstance(storage, Storage):
        raise TypeError("a storage expected")
    return storage


MEANINGS = {
    **COMMON_MEANINGS,
    "numpy.dtype": PickledDtype,
    "numpy.ndarray": "the class of the array",
    "numpy.core.multiarray._reconstruct": PickledArray,
    "numpy.core.numeric._frombuffer": array_from_buffer,
    "torch._utils._rebuild_tensor_v2": DescribedTensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.storage._load_from_bytes": nested_storage,
}


def read_plain_pickle(file: BoundedFile) -> Any:
    """
    Read a plain pickle.

    Returns:
        The content, with arrays as `PickledArray` and tensors as `DescribedTensor`.

    Raises:
        RefusedPickleError: the pickle asks for something that weights do not need.
        Exception: of any type, if it is damaged.
    """
    return read_pickle(file, MEANINGS)
