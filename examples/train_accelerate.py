"""Train a model by a recipe, in a plain Accelerate loop; see docs/training.md.

    python examples/train_accelerate.py --config examples/configs/demo_scenes.yaml --output_dir run

On several GPUs or machines:

    accelerate launch --config_file examples/configs/accelerate/8_gpus.yaml examples/train_accelerate.py \
        --config examples/configs/coco_swin_t.yaml --output_dir run data.train.root=/data/coco

What a recipe says can be changed behind the options, as `section.key=value`.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from proscale_hf.endings import end_well


if __name__ == "__main__":
    end_well()  # before the imports that take seconds

try:
    import torch
    from accelerate.utils import send_to_device
    from tqdm import tqdm

    from proscale_hf.evaluation.evaluator import evaluate
    from proscale_hf.files.lock import folder_in_use
    from proscale_hf.files.memory import is_out_of_memory
    from proscale_hf.hub.license import check_may_publish
    from proscale_hf.hub.push import check_repo_id
    from proscale_hf.training.checkpoint import save_checkpoint, save_model
    from proscale_hf.training.measures import (
        Averages,
        best_measure,
        check_finite,
        count_faults,
        headline,
        loss_terms,
        peak_memory,
        skipped_images,
    )
    from proscale_hf.training.recipe import load_recipe
    from proscale_hf.training.run import Run, prepare
except ImportError as error:
    sys.exit(f'error: {error}; training needs what pip install "proscale-hf[train]" brings')

AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="recipe, such as those in examples/configs")
    parser.add_argument("--output_dir", type=Path, required=True, help="where model, checkpoints and log.jsonl go")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    parser.add_argument(
        "--report_to", action="append", default=[], help="tracker, such as tensorboard; may be repeated"
    )
    parser.add_argument("--push_to_hub", metavar="REPOSITORY", help="upload the finished model")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    return parser.parse_intermixed_args()


class StoppedError(Exception):
    """A signal, to this process or another one of the training, has ended it after a step."""

    def __init__(self, step: int, number: int):
        super().__init__(f"stopped by a signal after step {step}, all is saved: go on with --resume")
        self.signal = number


def catch_signals() -> list[int]:
    """A list that SIGTERM and Ctrl-C are added to from now on, in place of what they do otherwise."""
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(number))
    return signals


def report_training(run: Run, averages: Averages, learning_rate: float, images_per_second: float) -> None:
    """Report the means since the last report. A loss that is no number ends the training."""
    values = averages.take(run.accelerator)
    check_finite(values["loss"], run.progress.step)
    values |= {"learning_rate": learning_rate, "images_per_second": images_per_second}
    values |= {"memory_gb": peak_memory(run.accelerator.device)}
    run.report(values | count_faults(run.accelerator, run.model, run.train_data))


def evaluate_and_keep_best(run: Run) -> bool:
    """Evaluate, and save the model if it is the best so far; whether to stop since none was for too long."""
    results = evaluate(
        run.result,
        run.image_processor,
        run.validation_data,
        tasks=run.recipe.evaluation.tasks,
        batch_size=run.recipe.evaluation.batch_size,
        workers=run.recipe.workers,
        dtype=AUTOCAST[run.recipe.optimization.precision],
        accelerator=run.accelerator,
    )
    quality = headline(results)
    run.report(quality)
    if run.progress.is_new_best(quality[best_measure(results)]):
        save_model(run.accelerator, run.output / "best", run.result, run.image_processor)
    patience = run.recipe.evaluation.patience
    return patience is not None and run.progress.evaluations_without_best >= patience


def train(run: Run) -> None:
    recipe, accelerator, model, progress = run.recipe, run.accelerator, run.model, run.progress
    clip, batch_size, step_of_report = recipe.optimization.clip, recipe.optimization.batch_size, progress.step
    signals, averages, seconds = catch_signals(), Averages(), 0.0
    is_finished, is_hidden = progress.step >= run.total_steps, not accelerator.is_main_process
    with tqdm(total=run.total_steps, initial=progress.step, unit="step", disable=is_hidden) as bar:
        while not is_finished:
            start = time.perf_counter()
            for _ in range(accelerator.gradient_accumulation_steps):
                batch = send_to_device(next(run.batches), accelerator.device, non_blocking=True)
                with accelerator.accumulate(model):
                    with accelerator.autocast():  # which `prepare` brings along without FSDP alone
                        outputs = model(**batch)
                    accelerator.backward(outputs.loss)
                    averages.add(loss_terms(outputs))
                    if accelerator.sync_gradients and clip is not None:
                        accelerator.clip_grad_norm_(model.parameters(), clip)
                    run.optimizer.step()
                    run.optimizer.zero_grad()
            learning_rate = max(run.scheduler.get_last_lr())  # not the backbone's
            run.scheduler.step()
            if run.ema is not None:
                run.ema.update_parameters(accelerator.unwrap_model(model))
            progress.step += 1
            bar.update()
            seconds += time.perf_counter() - start

            if signals:
                accelerator.set_trigger()
            is_stopped = accelerator.check_trigger()  # by a signal to any of the processes
            is_finished = progress.step >= run.total_steps
            is_saved = progress.step % recipe.checkpoint.every == 0 or is_stopped or is_finished
            if progress.step % recipe.log_every == 0 or is_saved:  # nothing is saved that the loss tells to be broken
                images = (progress.step - step_of_report) * batch_size
                report_training(run, averages, learning_rate, images / seconds)
                seconds, step_of_report = 0.0, progress.step
            if run.validation_data is not None and (progress.step % recipe.evaluation.every == 0 or is_finished):
                is_finished |= evaluate_and_keep_best(run)
            if is_saved or is_finished:
                save_checkpoint(accelerator, run.output, progress, run.ema, recipe.checkpoint.keep)
            if is_stopped and not is_finished:
                raise StoppedError(progress.step, signals[0] if signals else signal.SIGTERM)


def train_and_save(arguments: argparse.Namespace) -> None:
    """A recipe becomes a model in the output folder, and on the Hub if that is asked for."""
    repository, recipe = arguments.push_to_hub, load_recipe(arguments.config, arguments.overrides)
    if repository:
        check_repo_id(repository)
    is_main = os.environ.get("RANK", "0") == "0"  # as the launcher says; accelerate itself knows it later
    with folder_in_use(arguments.output_dir, is_main):
        run = prepare(recipe, arguments.output_dir, arguments.resume, arguments.report_to)
        accelerator, model = run.accelerator, run.accelerator.unwrap_model(run.model)
        if repository:
            check_may_publish(model.config, private=False)
        train(run)
        if skipped := skipped_images(run.train_data):
            accelerator.print(f"{len(skipped)} of the images could not be used, such as {skipped[0]}.")
        save_model(accelerator, run.output, run.result, run.image_processor)
        accelerator.end_training()
    if repository and accelerator.is_main_process:
        type(model).from_pretrained(run.output).push_to_hub(repository)
        run.image_processor.push_to_hub(repository)


def main() -> None:
    arguments = parse_arguments()
    try:
        train_and_save(arguments)
    except StoppedError as stopped:
        print(f"error: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.signal)  # as shells have it
    except Exception as error:
        if is_out_of_memory(error):
            sys.exit("error: out of memory: lower optimization.device_batch_size, the rest of a batch is accumulated")
        if isinstance(error, RuntimeError) and "find_unused_parameters" in str(error):
            sys.exit("error: parts of this backbone are unused: try train.py with --ddp_find_unused_parameters true")
        if not isinstance(error, ValueError | OSError) or isinstance(error, BrokenPipeError):
            raise
        # an error of a worker that loads images comes with its traceback, and its text last
        sys.exit(f"error: {str(error).strip().splitlines()[-1].rpartition('Error: ')[2]}")


if __name__ == "__main__":
    main()
