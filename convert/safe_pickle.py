"""Reads the weights in a detectron2 checkpoint without running code from it.

A pickle may name any function and have it called while it is read. Three kinds of file are met, told apart by
their first bytes and not by their suffix:

- torch's zip format and torch's older format (`.pth`): read by `torch.load(weights_only=True)`;
- a plain pickle (`.pkl`, the detectron2 model zoo): read by an unpickler that admits the handful of names
  from which arrays and tensors are rebuilt, and refuses every other one.
"""

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ConversionError


ZIP_START = b"PK\x03\x04"
OLD_TORCH_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # a number that stands for the format


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """
    Load the state dict of a checkpoint, bare or wrapped in `"model"`, without running code from the file.

    Args:
        path: A `.pth` (zip or older torch format) or `.pkl` (plain pickle of arrays or tensors) file.

    Returns:
        Tensors by name, on the CPU, in the file's dtypes. Those of a zip file are mapped, not read.

    Raises:
        ConversionError: the file is missing, damaged, wants something called that tensors do not need, or
            holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"There is no checkpoint file {path}.")
    with path.open("rb") as file:
        start = file.read(len(OLD_TORCH_START))
    try:
        if start.startswith(ZIP_START):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        elif start == OLD_TORCH_START:
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with path.open("rb") as file:
                content = TensorUnpickler(file, encoding="latin1").load()  # the encoding is for Python 2
    except Exception as error:  # a damaged pickle can raise almost anything
        raise ConversionError(_explain(path, error)) from error
    return _state_dict(path, content)


class ForbiddenNameError(pickle.UnpicklingError):
    """A pickle names something to import that weights do not need."""


class TensorUnpickler(pickle.Unpickler):
    """An unpickler that builds plain containers and values, numpy arrays and torch tensors, nothing else."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        full_name = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # numpy 2 moved them
        if full_name not in REBUILDERS:
            raise ForbiddenNameError(f"{module}.{name}")
        return REBUILDERS[full_name]


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


def _load_storage(data: bytes) -> Any:
    # torch's own function of this purpose reads the bytes with weights_only=False
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


_reconstruct_array, *_ = np.empty(0).__reduce__()
_array_from_buffer, *_ = np.empty(0).__reduce_ex__(5)
REBUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _encode_latin1,
    "numpy.dtype": np.dtype,
    "numpy.ndarray": np.ndarray,
    "numpy.core.multiarray._reconstruct": _reconstruct_array,
    "numpy.core.numeric._frombuffer": _array_from_buffer,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch.storage._load_from_bytes": _load_storage,
}


def _explain(path: Path, error: Exception) -> str:
    named_by_torch = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, ForbiddenNameError) or named_by_torch:
        name = named_by_torch[1] if named_by_torch else error
        return f"{path} is refused: reading it would call {name}, which weights do not need."
    if isinstance(error, OSError):
        return f"{path} cannot be read: {error.strerror or error}."
    return f"{path} is damaged, or no checkpoint in torch's or pickle's format."


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not content:
        raise ConversionError(f"{path} holds no state dict, neither at the top nor under 'model'.")
    state, others = {}, []
    for name, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.dtype.isnative:
            value = torch.tensor(value)
        if isinstance(name, str) and isinstance(value, Tensor):
            state[name] = value
        else:
            others.append(str(name))
    if others:
        raise ConversionError(f"{path} holds entries that are no tensors: {', '.join(others)}.")
    return state
