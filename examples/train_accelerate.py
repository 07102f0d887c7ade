"""Train a model by a recipe, in a plain Accelerate loop; see docs/training.md.

    python examples/train_accelerate.py --config examples/configs/demo_scenes.yaml --output_dir run

On several GPUs or machines:

    accelerate launch --config_file examples/configs/accelerate/8_gpus.yaml examples/train_accelerate.py \
        --config examples/configs/coco_swin_t.yaml --output_dir run data.train.root=/data/coco

What a recipe says can be changed behind the options, as `section.key=value`.
"""

import argparse
import json
import math
import signal
import sys
import time
from pathlib import Path


try:
    import torch
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import DistributedType, GradientAccumulationPlugin, send_to_device, set_seed
    from tqdm import tqdm

    from proscale_hf.evaluation.evaluator import evaluate
    from proscale_hf.hub.license import check_may_publish
    from proscale_hf.hub.push import check_repo_id
    from proscale_hf.training import checkpoint, measures
    from proscale_hf.training.batches import training_batches
    from proscale_hf.training.ema import create_ema
    from proscale_hf.training.optimization import count_steps, create_optimizer, create_scheduler, split_batch
    from proscale_hf.training.recipe import Recipe, load_recipe
    from proscale_hf.training.setup import load_datasets, load_model_and_processor, training_set
except ModuleNotFoundError as error:
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


def create_accelerator(arguments: argparse.Namespace, recipe: Recipe) -> Accelerator:
    if missing := set(arguments.report_to) - {str(tracker.value) for tracker in get_available_trackers()}:
        raise ValueError(f"there is no tracker {', '.join(sorted(missing))} here: install it, or mend --report_to")
    accelerator = Accelerator(
        mixed_precision=recipe.optimization.precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(sync_with_dataloader=False),
        step_scheduler_with_optimizer=False,  # one step of the schedule is one update, for any number of processes
        log_with=arguments.report_to or None,
        project_dir=arguments.output_dir,
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        if recipe.optimization.ema is not None:
            raise ValueError("an average of weights that are spread by FSDP is not possible: set optimization.ema=null")
        accelerator.state.fsdp_plugin.mixed_precision_policy = None  # it rounds the loss; autocast does not
    return accelerator


def report(accelerator: Accelerator, output: Path, step: int, values: dict[str, float]) -> None:
    """One line on the terminal, one in log.jsonl, and what the trackers make of it."""
    accelerator.log(values, step=step)
    if accelerator.is_main_process:
        tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        with (output / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def train(arguments: argparse.Namespace, recipe: Recipe) -> None:
    output, optimization = arguments.output_dir, recipe.optimization
    earlier = checkpoint.checkpoints(output)
    if earlier and not arguments.resume:
        raise ValueError(f"{output} has checkpoints of an earlier run: add --resume, or choose another --output_dir")
    accelerator = create_accelerator(arguments, recipe)
    device_batch_size, passes = split_batch(optimization, accelerator.num_processes)
    accelerator.gradient_accumulation_steps = passes
    with accelerator.main_process_first():  # the others find the list of images in the cache
        train_data, validation_data = load_datasets(recipe)
    total_steps = count_steps(optimization, len(train_data))
    model, image_processor = load_model_and_processor(recipe, train_data.categories)
    if arguments.push_to_hub:
        check_repo_id(arguments.push_to_hub)
        check_may_publish(model.config, private=False)
    examples = training_set(recipe, train_data, image_processor)
    ema = None if optimization.ema is None else create_ema(model, optimization.ema, accelerator.device)
    optimizer = create_optimizer(model, optimization)
    scheduler = create_scheduler(optimizer, optimization, total_steps)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    result = model if ema is None else ema.module  # what is evaluated and saved

    set_seed(recipe.seed, device_specific=True)  # processes draw other points for the loss
    progress = checkpoint.Progress(processes=accelerator.num_processes, recipe=recipe.to_yaml())
    if earlier:
        progress = checkpoint.load_checkpoint(accelerator, earlier[-1], progress, ema)
    output.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers("proscale", config={"recipe": progress.recipe})
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(number))

    batches = training_batches(
        examples, recipe, device_batch_size, progress.step, accelerator.process_index, accelerator.num_processes
    )
    averages, seconds, images = measures.Averages(), 0.0, 0
    is_finished, is_hidden = progress.step >= total_steps, not accelerator.is_main_process
    with tqdm(total=total_steps, initial=progress.step, unit="step", disable=is_hidden) as bar:
        while not is_finished:
            start = time.perf_counter()
            for _ in range(passes):
                batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
                with accelerator.accumulate(model):
                    with accelerator.autocast():  # which `prepare` brings along without FSDP alone
                        outputs = model(**batch)
                    accelerator.backward(outputs.loss)
                    averages.add(measures.loss_terms(outputs))
                    if accelerator.sync_gradients and optimization.clip is not None:
                        accelerator.clip_grad_norm_(model.parameters(), optimization.clip)
                    optimizer.step()
                    optimizer.zero_grad()
            learning_rate = max(scheduler.get_last_lr())  # not the backbone's
            scheduler.step()
            if ema is not None:
                ema.update_parameters(accelerator.unwrap_model(model))
            progress.step += 1
            bar.update()
            images += optimization.batch_size
            seconds += time.perf_counter() - start

            if signals:
                accelerator.set_trigger()
            is_stopped = accelerator.check_trigger()  # by a signal to any of the processes
            is_finished = progress.step >= total_steps
            is_saved = progress.step % recipe.checkpoint.every == 0 or is_stopped or is_finished
            if progress.step % recipe.log_every == 0 or is_saved:  # nothing is saved that the loss tells to be broken
                values = averages.take(accelerator)
                if not math.isfinite(values["loss"]):
                    raise ValueError(f"the loss is {values['loss']} at step {progress.step}: lower the learning rate")
                memory = measures.peak_memory(accelerator.device)
                values |= {"learning_rate": learning_rate, "images_per_second": images / seconds, "memory_gb": memory}
                values |= measures.count_faults(accelerator, model, train_data)
                report(accelerator, output, progress.step, values)
                images, seconds = 0, 0.0

            if validation_data is not None and (progress.step % recipe.evaluation.every == 0 or is_finished):
                options = {"tasks": recipe.evaluation.tasks, "batch_size": recipe.evaluation.batch_size}
                options |= {"workers": recipe.workers, "dtype": AUTOCAST[optimization.precision]}
                results = evaluate(result, image_processor, validation_data, accelerator=accelerator, **options)
                headline = measures.headline(results)
                report(accelerator, output, progress.step, headline)
                if progress.is_new_best(headline[measures.best_measure(results)]):
                    checkpoint.save_model(accelerator, output / "best", result, image_processor)
                patience = recipe.evaluation.patience
                is_finished |= patience is not None and progress.evaluations_without_best >= patience

            if is_saved or is_finished:
                checkpoint.save_checkpoint(accelerator, output, progress, ema, recipe.checkpoint.keep)
            if is_stopped and not is_finished:
                raise ValueError(f"stopped by a signal after step {progress.step}, all is saved: go on with --resume")
    if skipped := measures.skipped_images(train_data):
        accelerator.print(f"{len(skipped)} of the images could not be used, such as {skipped[0]}.")
    checkpoint.save_model(accelerator, output, result, image_processor)
    accelerator.end_training()
    if arguments.push_to_hub and accelerator.is_main_process:
        type(accelerator.unwrap_model(model)).from_pretrained(output).push_to_hub(arguments.push_to_hub)
        image_processor.push_to_hub(arguments.push_to_hub)


def main() -> None:
    arguments = parse_arguments()
    try:
        train(arguments, load_recipe(arguments.config, arguments.overrides))
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory: lower optimization.device_batch_size, the rest of a batch is accumulated")
    except RuntimeError as error:
        if "find_unused_parameters" not in str(error):
            raise
        sys.exit("error: parts of this backbone are unused: try train.py with --ddp_find_unused_parameters true")
    except (ValueError, OSError) as error:
        # an error of a worker that loads images comes with its traceback, and its text last
        sys.exit(f"error: {str(error).strip().splitlines()[-1].rpartition('Error: ')[2]}")


if __name__ == "__main__":
    main()
