"""What a training leaves on disk: every folder and file is whole or not there, whatever happens while it is written.

    OUTPUT/checkpoints/step-00005000/    all that `--resume` needs to go on as if nothing had happened
    OUTPUT/best/                         the best model so far, complete as for the Hub
    OUTPUT/                              the last model, complete as for the Hub

Nothing of a checkpoint is executed when it is loaded: accelerate and PyTorch read it with `weights_only`.
"""

import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from proscale_hf.files.text import one_line


FOLDER = "checkpoints"
PREFIX = "step-"
PROGRESS = "progress.json"
EMA = "ema.pt"
UNLIKELY_SEED = 0x7A3C_19E5_D04B_62F1
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    SafetensorError,
    pickle.UnpicklingError,
    yaml.YAMLError,
)


class CheckpointError(ValueError):
    """A checkpoint or model cannot be written or read; the text is one line."""


@dataclass
class Progress:
    """
    How far a training is.

    Attributes:
        step: updates done.
        best: value of the measure that decides, at its best; None before the first evaluation.
        evaluations_without_best: how many in a row.
        processes: how many train together.
        recipe: the whole recipe, as YAML.
    """

    step: int = 0
    best: float | None = None
    evaluations_without_best: int = 0
    processes: int = 1
    recipe: str = ""

    def is_new_best(self, value: float) -> bool:
        """Take note of an evaluation's result; whether it is better than all before."""
        is_best = self.best is None or value > self.best
        self.best = value if is_best else self.best
        self.evaluations_without_best = 0 if is_best else self.evaluations_without_best + 1
        return is_best


def save_checkpoint(accelerator: Any, output: Path, progress: Progress, ema: Any = None, keep: int = 2) -> None:
    """
    Save everything that training needs to go on, then delete all but the newest checkpoints.

    Args:
        accelerator: an `accelerate.Accelerator` that prepared model, optimizer and scheduler; all its processes must
            call this.
        output: of the training.
        progress: how far it is.
        ema: the average of the weights, if there is.
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: it cannot be written; the earlier ones are still there, and nothing else.
    """
    folder = output / FOLDER / f"{PREFIX}{progress.step:08d}"
    if folder.exists():
        return
    with _unfinished(accelerator, folder) as unfinished:
        accelerator.save_state(unfinished)
        if accelerator.is_main_process:
            if ema is not None:
                torch.save(ema.state_dict(), unfinished / EMA)
            (unfinished / PROGRESS).write_text(json.dumps(asdict(progress), indent=1))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            flush(unfinished)
            unfinished.rename(folder)
    if accelerator.is_main_process:
        for old in checkpoints(output)[:-keep]:
            shutil.rmtree(old)


def checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints of a training, oldest first."""
    return sorted(folder for folder in (output / FOLDER).glob(f"{PREFIX}*") if folder.is_dir())


def load_checkpoint(accelerator: Any, folder: Path, now: Progress, ema: Any = None) -> Progress:
    """
    Restore what `save_checkpoint` saved, random number generators included.

    Args:
        accelerator: an `accelerate.Accelerator` that prepared model, optimizer and scheduler.
        folder: one of `checkpoints`.
        now: with recipe and processes of this run. A line says where they differ from the checkpoint's: the run then
            is not what it would have been.
        ema: the average of the weights, if there is.

    Returns:
        How far the training was, with recipe and processes of this run.

    Raises:
        CheckpointError: it does not belong to this recipe, or is damaged.
    """
    with reading(folder):
        progress = Progress(**json.loads((folder / PROGRESS).read_text()))
        changes = differences(yaml.safe_load(progress.recipe), yaml.safe_load(now.recipe))
        if progress.processes != now.processes:
            changes.append(f"number of processes (was {progress.processes})")
        if changes:
            accelerator.print(f"Changed since {folder}: {', '.join(changes)}.")
        load_state(accelerator, folder, with_random_numbers=progress.processes == now.processes)
        if ema is not None:
            ema.load_state_dict(torch.load(folder / EMA, map_location="cpu", weights_only=True))
    return replace(progress, recipe=now.recipe, processes=now.processes)


@contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Turns what libraries raise over a checkpoint that is damaged or another model's into a `CheckpointError`."""
    try:
        yield
    except UNREADABLE as error:
        raise CheckpointError(
            f"cannot resume from {folder}: {one_line(error)}; if it is damaged, delete it to go on from the one before"
        ) from error


def load_state(accelerator: Any, folder: Path, with_random_numbers: bool) -> None:
    """`accelerator.load_state`, which passes over random states it cannot read; here that is an error, if asked."""
    torch.manual_seed(UNLIKELY_SEED)
    unlikely_state = torch.get_rng_state()
    accelerator.load_state(folder)
    if with_random_numbers and torch.equal(torch.get_rng_state(), unlikely_state):
        raise CheckpointError("the states of the random numbers are missing or damaged")


def save_model(accelerator: Any, folder: Path, model: Any, image_processor: Any) -> None:
    """
    Save a model and its image processor as a complete repository for the Hub, in place of what was there.

    Args:
        accelerator: an `accelerate.Accelerator`; all its processes must call this.
        folder: where to.
        model: as the accelerator prepared it, or not prepared.
        image_processor: the model's.

    Raises:
        CheckpointError: it cannot be written; the earlier model is still there.
    """
    with _unfinished(accelerator, folder / "model") as unfinished:
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            accelerator.unwrap_model(model).save_pretrained(unfinished, state_dict=weights)
            image_processor.save_pretrained(unfinished)
            flush(unfinished)
            for file in unfinished.iterdir():
                os.replace(file, folder / file.name)


def flush(folder: Path) -> None:
    """Wait until all files of a folder are on the disk; a network disk may say only now that it is full."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


@contextmanager
def _unfinished(accelerator: Any, folder: Path) -> Iterator[Path]:
    """A hidden folder to write into, beside the one that is meant. It is gone afterwards, also after an error."""
    unfinished = folder.with_name(f".{folder.name}.partial")
    try:
        with writing(folder):
            if accelerator.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
                unfinished.mkdir(parents=True)
            accelerator.wait_for_everyone()
            yield unfinished
            accelerator.wait_for_everyone()
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turns what libraries raise over a file that cannot be written into a `CheckpointError`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        guess = " (is the disk full?)" if isinstance(error, RuntimeError) else ""  # PyTorch does not pass on the reason
        raise CheckpointError(
            f"cannot write {place}: {one_line(error)}{guess}; what was saved before is whole"
        ) from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Full names of the keys that two recipes, as plain values, do not have in common with the same value."""
    names = []
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            names.append(f"{prefix}{key}")
    return names
