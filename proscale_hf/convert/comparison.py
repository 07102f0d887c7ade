"""Compares a converted model's numbers with recorded ones, one stage after the other."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from proscale_hf.convert import ConversionError
from proscale_hf.files.text import one_line


class Comparison(NamedTuple):
    """One recorded tensor compared with the model's: the error, and the largest error that is accepted."""

    stage: str
    shape: tuple[int, ...]
    error: float
    tolerance: float


def table_of(comparisons: Iterable[Comparison], path: Path) -> str:
    """
    Args:
        comparisons: In the order of computation.
        path: Of the recorded file.

    Returns:
        A table with the error of each stage.

    Raises:
        ConversionError: one is too large; the message names the stage, and those before it that agree.
    """
    agreeing: list[Comparison] = []
    for comparison in comparisons:
        if not comparison.error <= comparison.tolerance:  # NaN departs as well
            agree = f"; {', '.join(c.stage for c in agreeing)} agree" if agreeing else ""
            raise ConversionError(
                f"The model departs from {path} at {comparison.stage}: error {comparison.error:.2g}, "
                f"tolerance {comparison.tolerance:.2g}{agree}."
            )
        agreeing.append(comparison)
    rows = [(c.stage, " x ".join(map(str, c.shape)), f"{c.error:.1e}") for c in agreeing]
    return table(("stage", "shape", "error"), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, as wide as they must be."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows))
    return "\n".join(line.rstrip() for line in lines)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run a `with` block on one thread: more threads round differently, which can flip a pixel of an attention mask."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_model(model: PreTrainedModel, pixel_values: Tensor, **options: Any) -> ModelOutput:
    """
    The model's output, without gradients.

    Raises:
        ConversionError: the model fails.
    """
    options = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in options.items()}
    try:
        with torch.inference_mode():
            return model(pixel_values.to(model.device), **options, return_dict=True)
    except (RuntimeError, ValueError, MemoryError) as error:  # RuntimeError: too little memory, or another shape
        raise ConversionError(f"The model fails on pixels of {shape_text(pixel_values)}: {one_line(error)}") from error


def check_shape(stage: str, found: Tensor, recorded: Tensor) -> None:
    """Raise if two tensors cannot be compared."""
    if found.shape != recorded.shape:
        raise ConversionError(
            f"{stage} cannot be compared: {shape_text(recorded)} is recorded, the model gives {shape_text(found)}."
        )


def relative_error(found: Tensor, recorded: Tensor) -> float:
    """Largest absolute error relative to the largest absolute value recorded."""
    found, recorded = found.float().cpu(), recorded.float()
    return ((found - recorded).abs().max() / recorded.abs().max().clamp(min=1e-30)).item()


def shape_text(tensor: Tensor) -> str:
    """A shape for a message: `2 x 3 x 150 x 205`."""
    return " x ".join(map(str, tensor.shape))
