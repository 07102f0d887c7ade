"""What a training leaves on disk, and how it goes on from there; the plain loop and `SegmentationTrainer` alike.

    OUTPUT/checkpoints/step-00005000/    a checkpoint of the plain loop, as `accelerate` writes it
    OUTPUT/checkpoint-5000/              a checkpoint of `SegmentationTrainer`, as `Trainer` writes it
    OUTPUT/best/                         the best model of the plain loop so far, complete as for the Hub
    OUTPUT/                              the last model, complete as for the Hub

The rules are the same for all:

- A folder is written under a hidden name and gets its own once all of it is on the disk (`written_whole`).
- Older checkpoints are deleted only after that (`delete_old`).
- With an average of the weights, a checkpoint has both: the weights, and the average (`save_average`).
- Nothing in a checkpoint is executed: accelerate, transformers and PyTorch read it with `weights_only`.
- What is damaged, or another model's, is refused in one line that names the folder (`reading`).
- A new training does not mix its checkpoints with those of another (`choose_checkpoint`).
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


try:
    from accelerate.utils import load
except ImportError as error:
    raise ImportError('training needs accelerate: pip install "proscale-hf[train]"') from error

from proscale_hf.files.folders import flush, folder_replaced_whole, unfinished_folder
from proscale_hf.files.memory import is_out_of_memory
from proscale_hf.files.text import one_line


PREFIX = "checkpoints/step-"  # of the plain loop
PROGRESS = "progress.json"
AVERAGE = "average.safetensors"
AVERAGE_0_1 = "ema.pt"  # the name that the plain loop of version 0.1 gave it


class CheckpointError(ValueError):
    """A checkpoint or model cannot be written or read; the text is one line."""


# Errors


@contextmanager
def saving(place: Path) -> Iterator[None]:
    """Turns what PyTorch, safetensors and the system raise over a full disk into a `CheckpointError`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        guess = " (is the disk full?)" if isinstance(error, RuntimeError) else ""  # PyTorch does not pass on the reason
        raise CheckpointError(
            f"cannot write {place}: {one_line(error)}{guess}; what was saved before is whole"
        ) from error


@contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Turns what libraries raise over a checkpoint that is damaged or another model's into a `CheckpointError`."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):  # which is not the checkpoint's fault
            raise
        raise CheckpointError(
            f"cannot resume from {folder}: {one_line(error)}; if it is damaged, delete it to go on from the one before"
        ) from error


# Folders


def checkpoints(output: Path, prefix: str = PREFIX) -> list[Path]:
    """The whole checkpoints of a training, sorted by their steps.

    Args:
        output: of the training.
        prefix: what stands before the step in their names, seen from `output`.
    """
    found = [folder for folder in output.glob(f"{prefix}*") if _step(folder).isdigit() and folder.is_dir()]
    return sorted(found, key=lambda folder: int(_step(folder)))


def _step(folder: Path) -> str:
    return folder.name.rpartition("-")[2]


def choose_checkpoint(output: Path, resume: str | None, option: str, prefix: str = PREFIX) -> Path | None:
    """Where a training starts.

    Args:
        output: of the training.
        resume: a checkpoint; `"last"`: the newest one in `output`, if there is any; None: a new training is meant.
        option: how the command line says `"last"`, for the error.
        prefix: see `checkpoints`.

    Returns:
        The checkpoint to resume from; None for a new training.

    Raises:
        CheckpointError: a new training is meant, but there are checkpoints in `output`.
    """
    found = checkpoints(output, prefix)
    if resume is None and found:
        raise CheckpointError(f"{output} has checkpoints of another training: add {option}, or choose another folder")
    if resume in (None, "last"):
        return found[-1] if found else None
    return Path(resume)


@contextmanager
def written_whole(accelerator: Any, checkpoint: Path) -> Iterator[Path]:
    """A hidden folder to write a checkpoint into, which gets its name at the end; see `folder_replaced_whole`.

    Raises:
        CheckpointError: it cannot be written; what was there before is still there, and nothing else.
    """
    with saving(checkpoint), folder_replaced_whole(checkpoint, accelerator) as unfinished:
        yield unfinished


def delete_old(found: list[Path], keep: int, needed: Collection[Path]) -> None:
    """Delete the checkpoints with the fewest steps.

    Args:
        found: what `checkpoints` found.
        keep: how many stay.
        needed: checkpoints that stay in any case.
    """
    surplus = max(0, len(found) - keep)
    for folder in [folder for folder in found if folder not in needed][:surplus]:
        shutil.rmtree(folder, ignore_errors=True)


# Contents


def save_average(ema: nn.Module, folder: Path) -> None:
    """Write the average of the weights (of `create_ema`) into a checkpoint."""
    save_file(ema.state_dict(), folder / AVERAGE)


def load_average(ema: nn.Module, folder: Path, model: nn.Module) -> None:
    """Restore the average of the weights.

    Args:
        ema: what is filled.
        folder: the checkpoint. If it has no average, since the training had none before, the average begins anew.
        model: not wrapped, with the checkpoint's weights.
    """
    if (folder / AVERAGE).is_file():
        ema.load_state_dict(load_file(folder / AVERAGE))
    elif (folder / AVERAGE_0_1).is_file():
        ema.load_state_dict(torch.load(folder / AVERAGE_0_1, map_location="cpu", weights_only=True))
    else:
        ema.module.load_state_dict(model.state_dict())


def check_random_states(file: Path) -> None:
    """Raises unless the states of the random numbers can be read.

    They are read beforehand since accelerate passes over what it cannot read, and `Trainer` finds out late.
    """
    load(file, map_location="cpu")


def save_model(accelerator: Any, folder: Path, model: nn.Module, image_processor: Any) -> None:
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
    with saving(folder), unfinished_folder(folder / "model", accelerator) as unfinished:
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            accelerator.unwrap_model(model).save_pretrained(unfinished, state_dict=weights)
            image_processor.save_pretrained(unfinished)
            flush(unfinished)
            for file in unfinished.iterdir():
                os.replace(file, folder / file.name)


# The plain loop


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


def save_checkpoint(
    accelerator: Any, output: Path, progress: Progress, ema: nn.Module | None = None, keep: int = 2
) -> None:
    """
    Save everything that training needs to go on, then delete all but the newest checkpoints.

    Args:
        accelerator: an `accelerate.Accelerator` that prepared model, optimizer and scheduler; all its processes must
            call this.
        output: of the training.
        progress: how far it is.
        ema: the average of the weights, if there is one.
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: it cannot be written; the earlier ones are still there, and nothing else.
    """
    checkpoint = output / f"{PREFIX}{progress.step:08d}"
    with written_whole(accelerator, checkpoint) as unfinished:
        accelerator.save_state(unfinished)
        if accelerator.is_main_process:
            if ema is not None:
                save_average(ema, unfinished)
            (unfinished / PROGRESS).write_text(json.dumps(asdict(progress), indent=1))
    if accelerator.is_main_process:
        delete_old(checkpoints(output), keep, [checkpoint])


def load_checkpoint(
    accelerator: Any, checkpoint: Path, now: Progress, model: nn.Module, ema: nn.Module | None = None
) -> Progress:
    """
    Restore what `save_checkpoint` saved, random number generators included.

    Args:
        accelerator: an `accelerate.Accelerator` that prepared model, optimizer and scheduler.
        checkpoint: one of `checkpoints`.
        now: with recipe and processes of this run. A line says where they differ from the checkpoint's: the run then
            is not what it would have been.
        model: as the accelerator prepared it.
        ema: the average of the weights, if there is one.

    Returns:
        How far the training was, with recipe and processes of this run.

    Raises:
        CheckpointError: it does not belong to this recipe, or is damaged.
    """
    with reading(checkpoint):
        progress = Progress(**json.loads((checkpoint / PROGRESS).read_text()))
        changes = differences(yaml.safe_load(progress.recipe), yaml.safe_load(now.recipe))
        if progress.processes == now.processes:
            check_random_states(checkpoint / f"random_states_{accelerator.process_index}.pkl")
        else:
            changes.append(f"number of processes (was {progress.processes})")
        if changes:
            accelerator.print(f"Changed since {checkpoint}: {', '.join(changes)}.")
        accelerator.load_state(checkpoint)
        if ema is not None:
            load_average(ema, checkpoint, accelerator.unwrap_model(model))
    return replace(progress, recipe=now.recipe, processes=now.processes)


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
