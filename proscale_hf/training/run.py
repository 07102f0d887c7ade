"""A training in the plain loop: what a recipe stands for, prepared by accelerate, and where it reports to."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


try:
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import DistributedType, GradientAccumulationPlugin, set_seed
    from tqdm import tqdm
except ImportError as error:
    raise ImportError('training needs accelerate: pip install "proscale-hf[train]"') from error

from proscale_hf.data.dataset import SegmentationDataset
from proscale_hf.training.batches import training_batches
from proscale_hf.training.checkpoint import Progress, choose_checkpoint, load_checkpoint
from proscale_hf.training.ema import create_ema
from proscale_hf.training.optimization import count_steps, create_optimizer, create_scheduler, split_batch
from proscale_hf.training.recipe import Recipe
from proscale_hf.training.setup import load_datasets, load_model_and_processor, training_set


@dataclass
class Run:
    """
    A training at the step where it starts or goes on.

    Attributes:
        recipe: what is computed.
        output: where model, checkpoints and `log.jsonl` go.
        accelerator: connects the processes that train together. Gradients are accumulated over its
            `gradient_accumulation_steps` batches.
        model, optimizer, scheduler: as the accelerator prepared them.
        ema: the average of the weights, if the recipe has one.
        image_processor: the model's.
        train_data: images to train on.
        validation_data: images to evaluate on, if the recipe has any.
        batches: this process's inputs of the model, without end, on the CPU.
        total_steps: updates of the whole training.
        progress: how far the training is.
    """

    recipe: Recipe
    output: Path
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    ema: nn.Module | None
    image_processor: Any
    train_data: SegmentationDataset
    validation_data: SegmentationDataset | None
    batches: Iterator[dict[str, Any]]
    total_steps: int
    progress: Progress

    @property
    def result(self) -> nn.Module:
        """The model to evaluate and to save."""
        return self.model if self.ema is None else self.ema.module

    def report(self, values: dict[str, float]) -> None:
        """One line on the terminal, one in `log.jsonl`, and what the trackers make of it."""
        step = self.progress.step
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
            with (self.output / "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


def prepare(recipe: Recipe, output: Path, resume: bool = False, trackers: Collection[str] = ()) -> Run:
    """
    Make everything that a training needs, and restore the newest checkpoint if there is one.

    Args:
        recipe: what to train.
        output: folder of the training; it is made.
        resume: go on from the newest checkpoint, if there is one.
        trackers: names of accelerate's trackers, such as `"tensorboard"`.

    Raises:
        ValueError: the recipe is not possible, data are missing, a tracker is not installed, the checkpoint is damaged,
            or there are checkpoints though `resume` is not set; one line.
    """
    optimization = recipe.optimization
    checkpoint = choose_checkpoint(output, "last" if resume else None, "--resume")
    accelerator = create_accelerator(recipe, output, trackers)
    rank, processes = accelerator.process_index, accelerator.num_processes
    device_batch_size, accelerator.gradient_accumulation_steps = split_batch(optimization, processes)
    with accelerator.main_process_first():  # the others find the list of images in the cache
        train_data, validation_data = load_datasets(recipe)
    total_steps = count_steps(optimization, len(train_data))
    model, image_processor = load_model_and_processor(recipe, train_data.categories)
    examples = training_set(recipe, train_data, image_processor)
    ema = None if optimization.ema is None else create_ema(model, optimization.ema, accelerator.device)
    optimizer = create_optimizer(model, optimization)
    scheduler = create_scheduler(optimizer, optimization, total_steps)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    set_seed(recipe.seed, device_specific=True)  # processes draw other points for the loss
    progress = Progress(processes=processes, recipe=recipe.to_yaml())
    if checkpoint is not None:
        progress = load_checkpoint(accelerator, checkpoint, progress, model, ema)
    output.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers("proscale", config={"recipe": progress.recipe})
    return Run(
        recipe=recipe,
        output=output,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        ema=ema,
        image_processor=image_processor,
        train_data=train_data,
        validation_data=validation_data,
        batches=training_batches(examples, recipe, device_batch_size, progress.step, rank, processes),
        total_steps=total_steps,
        progress=progress,
    )


def create_accelerator(recipe: Recipe, output: Path, trackers: Collection[str]) -> Accelerator:
    """
    Raises:
        ValueError: a tracker is not installed, or the average of sharded weights is asked for.
    """
    if missing := set(trackers) - {str(tracker.value) for tracker in get_available_trackers()}:
        raise ValueError(f"there is no tracker {', '.join(sorted(missing))} here: install it, or mend --report_to")
    accelerator = Accelerator(
        mixed_precision=recipe.optimization.precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(sync_with_dataloader=False),
        step_scheduler_with_optimizer=False,  # one step of the schedule is one update, for any number of processes
        log_with=list(trackers) or None,
        project_dir=output,
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        if recipe.optimization.ema is not None:
            raise ValueError("an average of weights that are spread by FSDP is not possible: set optimization.ema=null")
        accelerator.state.fsdp_plugin.mixed_precision_policy = None  # it rounds the loss; autocast does not
    return accelerator
