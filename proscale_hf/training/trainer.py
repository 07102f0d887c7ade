"""Training with transformers' `Trainer`: what segmentation adds to it, and what a recipe means in its arguments."""

from collections.abc import Collection
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn


try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError('training needs accelerate: pip install "proscale-hf[train]"') from error

from proscale_hf.data.collate import collate
from proscale_hf.data.objects import check_objects
from proscale_hf.evaluation.agreement import choose_tasks
from proscale_hf.evaluation.evaluator import evaluate
from proscale_hf.training.checkpoint import (
    check_random_states,
    checkpoints,
    delete_old,
    load_average,
    reading,
    save_average,
    written_whole,
)
from proscale_hf.training.ema import create_ema
from proscale_hf.training.measures import BEST_BY, Averages, check_finite, count_faults, loss_terms
from proscale_hf.training.metrics import summary
from proscale_hf.training.optimization import create_optimizer, create_scheduler, split_batch
from proscale_hf.training.recipe import OptimizationSection, Recipe


PREFIX = f"{PREFIX_CHECKPOINT_DIR}-"


class SegmentationTrainer(Trainer):
    """`Trainer` for this model and `proscale_hf`'s data sets.

    Beside `Trainer`'s own entries, the log has the losses and the counts of faults that `measures.py` explains.

    Checkpoints, `checkpoint-N`, follow the rules of `checkpoint.py`. With an average of the weights
    (`optimization.ema`), the average is evaluated, and `model` holds it after training.

    Args:
        optimization: a recipe's section. By default `Trainer` optimizes as its `args` say.
        tasks: what `evaluate` measures; by default all that the data set has the truth for. Unless `args` say
            otherwise, the first task decides which checkpoint is best.
        options: what `Trainer` takes. `train_dataset` is a `TransformedDataset`; `eval_dataset` is a
            `SegmentationDataset`, since evaluation begins with the original images; `processing_class` is the image
            processor. `data_collator` is `collate` if it is not given.

    Raises:
        ValueError: one process has several GPUs, or sharded weights were to be averaged.
    """

    def __init__(
        self,
        *,
        optimization: OptimizationSection | None = None,
        tasks: Collection[str] | None = None,
        **options: Any,
    ):
        options.setdefault("data_collator", collate)
        super().__init__(**options)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process cannot train on {self.args.n_gpu} GPUs: start it with `accelerate launch`, or choose one "
                "GPU with CUDA_VISIBLE_DEVICES"
            )
        self.optimization = optimization
        self.tasks = tasks
        if self.args.metric_for_best_model in (None, "loss") and hasattr(self.eval_dataset, "source"):
            self.args.metric_for_best_model = BEST_BY[choose_tasks(self.eval_dataset, tasks)[0]].lower()
            self.args.greater_is_better = True
        self.averages = Averages()
        self.learning_rate = 0.0
        self.resumes_from: str | None = None
        self.resuming = ExitStack()
        self.ema = None
        if optimization is not None and optimization.ema is not None:
            if self.is_fsdp_enabled:
                raise ValueError("an average of sharded weights is not possible: set optimization.ema to null")
            self.ema = create_ema(self.model, optimization.ema)
        self.add_callback(SegmentationCallback(self))
        self.callback_handler.callbacks.insert(0, ResumedCallback(self))  # first: others' errors are not its business

    # Optimization

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.optimization is not None:
            self.optimizer = create_optimizer(self.model if model is None else model, self.optimization)
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None and self.optimization is not None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = create_scheduler(optimizer, self.optimization, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> Any:
        """As `Trainer`'s.

        Raises:
            CheckpointError: the checkpoint to resume from is damaged or another model's, or one cannot be written.
            ValueError: the data set has no object to train on.
        """
        check_objects(self.train_dataset)
        if resume_from_checkpoint is True and (found := checkpoints(Path(self.args.output_dir), PREFIX)):
            resume_from_checkpoint = str(found[-1])
        self.resumes_from = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        with ExitStack() as self.resuming:  # `ResumedCallback` closes it when the checkpoint has been read
            if self.resumes_from is not None:
                self.resuming.enter_context(reading(self.resumes_from))
                for file in Path(self.resumes_from).glob("rng_state*.pth"):
                    check_random_states(file)
            output = super().train(resume_from_checkpoint, *arguments, **options)
        if self.ema is not None:
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                load_average(self.ema, Path(self.state.best_model_checkpoint), self.model)
            self.model.load_state_dict(self.ema.module.state_dict())
        return output

    # Log

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **options: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        if model.training:
            self.averages.add(loss_terms(outputs))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # of training; all processes come here at the same step
            check_finite(logs["loss"], self.state.global_step)
            logs.update(self.averages.take(self.accelerator) | {"loss": logs["loss"]})
            logs["learning_rate"] = self.learning_rate
            dataset = getattr(self.train_dataset, "dataset", self.train_dataset)
            logs.update(count_faults(self.accelerator, self.model, dataset))
        super().log(logs, start_time)

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the model, or the average of its weights. No image is kept in memory after its batch.

        Args:
            eval_dataset: a `SegmentationDataset`, or several by name; by default the trainer's.
            ignore_keys: it has no effect; `Trainer` has this argument.
            metric_key_prefix: what the names of the results begin with.

        Returns:
            `eval_images`, `eval_images_per_second`, and the measures of the tasks in 0..1: `eval_pq`, `eval_sq`,
            `eval_rq`, `eval_pq_things`, `eval_pq_stuff`, `eval_ap`, `eval_ap50`, `eval_miou`.

        Raises:
            ValueError: the data set has other classes than the model, or an image or annotation cannot be used.
        """
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict):
            parts = [
                self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
                for name, dataset in eval_dataset.items()
            ]
            return {name: value for part in parts for name, value in part.items()}

        results = evaluate(
            self.model if self.ema is None else self.ema.module,
            self.processing_class,
            eval_dataset,
            tasks=self.tasks,
            batch_size=self.args.per_device_eval_batch_size,
            workers=self.args.dataloader_num_workers,
            dtype=torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None,
            accelerator=self.accelerator,
        )
        extra = {name: results[name] for name in ("images", "images_per_second")}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in (summary(results) | extra).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Does nothing, since `save_pretrained` of the model writes a card."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let `Trainer` write a checkpoint by the rules of `checkpoint.py`.

        This is the only private method that is overridden: `Trainer` has no public hook before it writes a checkpoint.
        Its arguments say where it writes, and whether it uploads the checkpoint and deletes older ones. So it gets
        other arguments for as long as the checkpoint is unfinished; uploading and deleting come after that.
        """
        checkpoint = Path(self._get_output_dir(trial), f"{PREFIX}{self.state.global_step}")
        with written_whole(self.accelerator, checkpoint) as unfinished:
            arguments, self.args = self.args, copy(self.args)
            self.args.output_dir = str(unfinished.parent)
            self.args.push_to_hub, self.args.save_total_limit = False, None
            try:
                super()._save_checkpoint(model, trial=None)
            finally:
                self.args = arguments
            best = checkpoint.with_name(f"{PREFIX}{self.state.best_global_step}")
            if best == checkpoint or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(unfinished / TRAINER_STATE_NAME)
                torch.save(self.args, unfinished / TRAINING_ARGS_NAME)
                if self.ema is not None:
                    save_average(self.ema, unfinished)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save and (self.args.save_total_limit or 0) > 0:
            needed = [checkpoint, Path(self.state.best_model_checkpoint or checkpoint)]
            delete_old(checkpoints(checkpoint.parent, PREFIX), self.args.save_total_limit, needed)


class ResumedCallback(TrainerCallback):
    """Comes when `Trainer` has read the checkpoint: what goes wrong from now on is not the checkpoint's fault.

    Args:
        trainer: the trainer that has this callback.
    """

    def __init__(self, trainer: SegmentationTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **references: Any
    ) -> None:
        trainer = self.trainer
        if trainer.ema is not None and trainer.resumes_from is not None:
            load_average(trainer.ema, Path(trainer.resumes_from), trainer.model)
        trainer.resuming.close()


class SegmentationCallback(TrainerCallback):
    """What `SegmentationTrainer` does at each epoch and step.

    Args:
        trainer: the trainer that has this callback.
    """

    def __init__(self, trainer: SegmentationTrainer):
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **references: Any
    ) -> None:
        dataset = self.trainer.train_dataset
        if hasattr(dataset, "set_epoch"):  # with several processes, accelerate's data loader does not
            dataset.set_epoch(int(state.epoch or 0))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **references: Any
    ) -> None:
        # The recipe's, for the log. `Trainer` would log the first group's, the backbone's, which is a share of it.
        self.trainer.learning_rate = max(self.trainer.lr_scheduler.get_last_lr())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **references: Any
    ) -> None:
        if self.trainer.ema is not None:
            self.trainer.ema.update_parameters(self.trainer.accelerator.unwrap_model(self.trainer.model))
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True
        control.should_log |= control.should_save  # the log refuses a broken loss before anything is saved


def training_settings(recipe: Recipe, processes: int) -> dict[str, Any]:
    """
    What a recipe means in `TrainingArguments`.

    Args:
        recipe: what to train.
        processes: how many train together.

    Returns:
        Keyword arguments, without `max_steps`, which may depend on the data, see `count_steps`. The rest of the
        recipe's optimization goes to `SegmentationTrainer` as `optimization`.

    Raises:
        RecipeError: the batch cannot be divided evenly among the processes.
    """
    optimization, evaluation = recipe.optimization, recipe.evaluation
    device_batch_size, passes = split_batch(optimization, processes)
    settings = {
        "per_device_train_batch_size": device_batch_size,
        "gradient_accumulation_steps": passes,
        "per_device_eval_batch_size": evaluation.batch_size,
        "learning_rate": optimization.learning_rate,
        "max_grad_norm": optimization.clip or 0.0,
        "bf16": optimization.precision == "bf16",
        "fp16": optimization.precision == "fp16",
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "dataloader_num_workers": recipe.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_drop_last": True,
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,
        "logging_steps": recipe.log_every,
        "logging_nan_inf_filter": False,  # it hides a NaN, and waits for the GPU at each step to do so
        "save_steps": recipe.checkpoint.every,
        "save_total_limit": recipe.checkpoint.keep,
        "report_to": "none",
    }
    if recipe.data.validation is not None:
        settings |= {
            "eval_strategy": "steps",
            "eval_steps": evaluation.every,
        }
    return settings
