"""Train a model by a recipe, with transformers' `Trainer`; see docs/training.md.

    python examples/train.py --config examples/configs/demo_scenes.yaml --output_dir run

On several GPUs or machines:

    accelerate launch --config_file examples/configs/accelerate/8_gpus.yaml examples/train.py \
        --config examples/configs/coco_swin_t.yaml --output_dir run data.train.root=/data/coco

What a recipe says can be changed as `section.key=value`; what it does not say are options of `TrainingArguments`.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from proscale_hf.endings import end_well


if __name__ == "__main__":
    end_well()  # before the imports that take seconds

try:
    from transformers import EarlyStoppingCallback, HfArgumentParser, TrainingArguments
    from transformers.integrations import get_available_reporting_integrations
    from transformers.trainer import TRAINER_STATE_NAME

    from proscale_hf.files.lock import folder_in_use
    from proscale_hf.files.memory import is_out_of_memory
    from proscale_hf.files.whole import write_whole
    from proscale_hf.training.checkpoint import choose_checkpoint, save_model
    from proscale_hf.training.optimization import count_steps
    from proscale_hf.training.recipe import Recipe, load_recipe
    from proscale_hf.training.setup import load_datasets, load_model_and_processor, training_set
    from proscale_hf.training.trainer import PREFIX, SegmentationTrainer, training_settings
except ImportError as error:
    sys.exit(f'error: {error}; training needs more packages: pip install "proscale-hf[train]"')

OVERRIDE = re.compile(r"\w+(\.\w+)*=")
# Options with which one would say something twice, and where a recipe says it.
OF_THE_RECIPE = {
    "learning_rate": "optimization.learning_rate",
    "weight_decay": "optimization.weight_decay",
    "lr_scheduler_type": "optimization.schedule",
    "warmup_steps": "optimization.warmup_steps",
    "max_steps": "optimization.max_steps",
    "num_train_epochs": "optimization.epochs",
    "per_device_train_batch_size": "optimization.device_batch_size",
    "gradient_accumulation_steps": "optimization.batch_size",
    "max_grad_norm": "optimization.clip",
    "bf16": "optimization.precision",
    "fp16": "optimization.precision",
    "seed": "seed",
    "data_seed": "seed",
}


@dataclass
class RecipeArguments:
    config: str = field(metadata={"help": "recipe, such as those in examples/configs"})


class OneLineParser(HfArgumentParser):
    """Says what is wrong with a command line, without the hundred options of its usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def parse_arguments(words: Sequence[str]) -> tuple[Recipe, TrainingArguments]:
    """
    Args:
        words: of the command line, in any order.

    Raises:
        ValueError: the recipe cannot be meant, or an option is not possible or the recipe's business; one line.
    """
    overrides = [word for word in words if OVERRIDE.match(word)]
    options = [word for word in words if not OVERRIDE.match(word)]
    parser = OneLineParser(
        (RecipeArguments, TrainingArguments), allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    given = parser.parse_args(options)
    for word in options:
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        if word.startswith("--") and name in OF_THE_RECIPE:
            raise ValueError(f"--{name} is up to the recipe: write {OF_THE_RECIPE[name]}=VALUE, without dashes")
    if given.output_dir is None:
        raise ValueError("give --output_dir, the folder for model and checkpoints")
    recipe = load_recipe(given.config, overrides)
    parser.set_defaults(**training_settings(recipe, processes=int(os.environ.get("WORLD_SIZE", 1))))
    _, arguments = parser.parse_args_into_dataclasses(options)
    trackers = {*get_available_reporting_integrations(), "none", "all"}
    if missing := [name for name in arguments.report_to if name not in trackers]:
        raise ValueError(f"--report_to {missing[0]} needs a package that is not installed")
    return recipe, arguments


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` names, or the newest of the output folder if it says `last`.

    Raises:
        ValueError: there is no such checkpoint, or there are some, but nothing is said about them.
    """
    output, option = Path(arguments.output_dir), "--resume_from_checkpoint last"
    checkpoint = choose_checkpoint(output, arguments.resume_from_checkpoint, option, PREFIX)
    if checkpoint is None:
        return None
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"{checkpoint} is no checkpoint: give a folder checkpoint-N, or the word last")
    return str(checkpoint)


def train(recipe: Recipe, arguments: TrainingArguments) -> None:
    """A recipe becomes a model in the output folder, and on the Hub if that is asked for."""
    with folder_in_use(Path(arguments.output_dir), arguments.process_index == 0):
        train_and_save(recipe, arguments)


def train_and_save(recipe: Recipe, arguments: TrainingArguments) -> None:
    checkpoint = checkpoint_to_resume(arguments)
    with arguments.main_process_first():
        train_data, validation_data = load_datasets(recipe)
    arguments.max_steps = count_steps(recipe.optimization, len(train_data))
    model, image_processor = load_model_and_processor(recipe, train_data.categories)
    trainer = SegmentationTrainer(
        model=model,
        args=arguments,
        train_dataset=training_set(recipe, train_data, image_processor),
        eval_dataset=validation_data,
        processing_class=image_processor,
        optimization=recipe.optimization,
        tasks=recipe.evaluation.tasks,
    )
    if recipe.evaluation.patience is not None and validation_data is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.evaluation.patience))
    if arguments.should_save:
        Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
        write_whole(Path(arguments.output_dir, "recipe.yaml"), lambda file: file.write(recipe.to_yaml().encode()))
    trainer.train(resume_from_checkpoint=checkpoint)
    save_model(trainer.accelerator, Path(arguments.output_dir), trainer.model, image_processor)
    trainer.save_state()
    if arguments.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()


def main() -> None:
    try:
        train(*parse_arguments(sys.argv[1:]))
    except Exception as error:
        if is_out_of_memory(error):
            sys.exit("error: out of memory: lower optimization.device_batch_size, the rest of a batch is accumulated")
        if not isinstance(error, ValueError | OSError) or isinstance(error, BrokenPipeError):
            raise
        # an error of a worker that loads images comes with its traceback, and its text last
        sys.exit(f"error: {str(error).strip().splitlines()[-1].rpartition('Error: ')[2]}")


if __name__ == "__main__":
    main()
