"""Reads the weights in a checkpoint without running code from it.

A pickle may name any function, and Python's unpickler calls it. Here `pickle_machine` reads every pickle, and calls
only a few functions of this package. The first bytes of a file say what it is, not its suffix:

- torch's zip format and torch's older format (`.pth`): see `torch_files`;
- a plain pickle (`.pkl`, the detectron2 model zoo) of numpy arrays or tensors: see `pickled_arrays`;
- safetensors, which hold no pickle.

Time and memory are in proportion to the file's size: what a file uses many times is made once.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from proscale_hf.convert import ConversionError
from proscale_hf.convert.pickle_machine import RefusedPickleError, Settings
from proscale_hf.convert.pickled_arrays import PickledArray, read_plain_pickle
from proscale_hf.convert.torch_files import (
    OLD_TORCH_START,
    WEIGHT_DTYPES,
    BoundedFile,
    DescribedTensor,
    read_old_torch,
    read_torch_zip,
)
from proscale_hf.files.reading import open_file, reading
from proscale_hf.files.text import FEW, printable, shown


T = TypeVar("T")

ZIP_START = b"PK\x03\x04"
PLAIN_PICKLE_STARTS = b"\x80(}]c"  # the version, or the first operation of a container in versions 0 and 1
KNOWN_STARTS = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the file it stands for; run `git lfs pull` to get that"),
    (b"<", "is a web page, not a checkpoint; the download needs another address, or a login"),
    (b"\x1f\x8b", "is compressed with gzip; decompress it first"),
)


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """
    Load the state dict of a checkpoint, bare or wrapped in `"model"`, without running code from the file.

    Args:
        path: A `.pth` (zip or older torch format), `.pkl` (plain pickle of arrays or tensors) or `.safetensors` file.

    Returns:
        Tensors by name, on the CPU, in the file's dtypes, all numbers finite. Other contents of the file, such as
        an optimizer's state, are left out. Tensors of a zip file are mapped, not read, unless they have 16 bits. What
        is one tensor in the file, under several names, is one here.

    Raises:
        ConversionError: the file is missing or damaged, calls something that weights do not need, claims more
            data than it has, or holds no state dict.
    """
    return _use_content(path, lambda content: _state_dict(path, content))


def load_checkpoint_and_settings(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """
    Load a checkpoint as DETR's successors write it, with the settings of its training.

    Args:
        path: As in [`load_checkpoint`].

    Returns:
        Tensors as there, of the averaged model `"ema_model"` if the file has one; and the values of the
        `argparse.Namespace` `"args"`, or None if there is none.

    Raises:
        ConversionError: as there.
    """

    def use(content: Any) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        settings = None
        if isinstance(content, dict):
            settings = content.get("args")
            content["model"] = content.get("ema_model") or content.get("model")
        return _state_dict(path, content), settings.values if isinstance(settings, Settings) else None

    return _use_content(path, use)


def _use_content(path: str | Path, use: Callable[[Any], T]) -> T:
    """What a function makes of a file's content, while the file is open."""
    if not Path(path).exists():
        raise ConversionError(f"There is no checkpoint file {path}.")
    with reading(path, "is damaged, or no checkpoint in torch's or pickle's format", ConversionError, _reason):
        try:
            with warnings.catch_warnings(), open_file(path, "checkpoint file") as file:
                warnings.simplefilter("ignore")  # the readers warn about files that are refused here in one line
                return use(_read(path, BoundedFile(file, os.fstat(file.fileno()).st_size)))
        except RefusedPickleError as error:
            raise ConversionError(f"{path} is refused: {error}.") from error


def _reason(error: Exception) -> str:
    """Only the type: a message of Python's about a damaged pickle says nothing to the file's owner."""
    return type(error).__name__


def _read(path: str | Path, file: BoundedFile) -> Any:
    """The content of the file; its tensors are torch's, or a `PickledArray` or `DescribedTensor`."""
    if not file.size:
        raise ConversionError(f"{path} is damaged: it is empty.")
    start = file.read(100)
    file.seek(0)
    for known_start, meaning in KNOWN_STARTS:
        if start.lstrip().startswith(known_start):
            raise ConversionError(f"{path} {meaning}.")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < file.size:
        return safetensors.torch.load_file(path)
    if start.startswith(ZIP_START):
        return read_torch_zip(file)
    if start.startswith(OLD_TORCH_START):
        return read_old_torch(file)
    if start[0] in PLAIN_PICKLE_STARTS:
        return read_plain_pickle(file)
    raise ValueError("no known format")


def _state_dict(path: str | Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not content:
        raise ConversionError(f"{path} holds no state dict, neither at the top nor under 'model'.")
    state: dict[str, Tensor] = {}
    is_finite: dict[int, bool] = {}  # of a tensor by its id, which it keeps as it is in the state dict
    others, not_finite = [], []
    for name in list(content):
        value = content.pop(name)  # the memory of an array is free again once its tensor is made
        tensor = value.tensor() if isinstance(value, PickledArray | DescribedTensor) else value
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.dtype not in WEIGHT_DTYPES.values():
            others.append(printable(name) if isinstance(name, str) else shown(name))
            continue
        state[name] = tensor
        if id(tensor) not in is_finite:
            is_finite[id(tensor)] = _is_finite(tensor)
        if not is_finite[id(tensor)]:
            not_finite.append(printable(name))
    if others:
        raise ConversionError(f"{path} holds entries that are no tensors: {_listed(others)}.")
    if not_finite:
        raise ConversionError(f"{path} holds weights that are infinite or no numbers: {_listed(not_finite)}.")
    return state


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more
