"""`SegmentationTrainer`: the same trajectory after resuming, its log, its evaluation, checkpoints that are whole."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import TINY_RESNET, TINY_SWIN
from proscale_hf import ProScaleMask2FormerForUniversalSegmentation, ProScaleMask2FormerImageProcessorPil


pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("yaml")
pytest.importorskip("pycocotools")

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from proscale_hf.data.collate import TrainingTransform, TransformedDataset
from proscale_hf.evaluation.evaluator import evaluate
from proscale_hf.training.checkpoint import CheckpointError
from proscale_hf.training.measures import LOSS_TERMS
from proscale_hf.training.recipe import DataSection, OptimizationSection, Recipe, RecipeError
from proscale_hf.training.trainer import SegmentationTrainer, training_settings
from squares import Squares, model_of_squares


def random_flip(image: torch.Tensor, planes: torch.Tensor, class_labels: torch.Tensor) -> tuple:
    return (image.flip(-1), planes.flip(-1)) if torch.rand(()) < 0.5 else (image, planes)


@pytest.fixture
def processor() -> ProScaleMask2FormerImageProcessorPil:
    return ProScaleMask2FormerImageProcessorPil(do_resize=False, label_ids_to_fuse=[3])


def make_trainer(
    folder: Path,
    processor: Any,
    model: torch.nn.Module | None = None,
    optimization: OptimizationSection | None = None,
    train: Squares | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **arguments: Any,
) -> SegmentationTrainer:
    settings = {
        "max_steps": 5,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_grad_norm": 0.01,
        "remove_unused_columns": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "disable_tqdm": True,
        **arguments,
    }
    return SegmentationTrainer(
        model=model_of_squares() if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=TransformedDataset(train or Squares(), TrainingTransform(random_flip, processor)),
        eval_dataset=Squares(2),
        processing_class=processor,
        optimization=optimization or OptimizationSection(learning_rate=1e-3, max_steps=5, batch_size=2),
        tasks=("panoptic", "instance", "semantic"),
        callbacks=callbacks,
    )


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_takes_the_same_path(processor, tmp_path, workers):
    """From the first epoch, and from the second one, whose flips are others."""
    optimization = OptimizationSection(learning_rate=1e-3, max_steps=5, batch_size=2, ema=0.9)
    options = {"optimization": optimization, "dataloader_num_workers": workers}
    whole = make_trainer(tmp_path, processor, **options)
    whole.train()
    for step in (2, 4):
        resumed = make_trainer(tmp_path / f"from-{step}", processor, model_of_squares(seed=1), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for name in ("loss", "loss_cross_entropy", "loss_mask", "loss_dice", "grad_norm", "learning_rate"):
            assert len(logged(whole, name)) == 5
            np.testing.assert_allclose(logged(resumed, name), logged(whole, name), rtol=0, atol=1e-5)
        assert resumed.ema.n_averaged == whole.ema.n_averaged == 5
        for actual, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            torch.testing.assert_close(actual, expected)


def test_each_epoch_is_augmented_anew(processor, tmp_path):
    seen = []
    trainer = make_trainer(tmp_path, processor, save_strategy="no")
    transform = trainer.train_dataset.transform
    trainer.train_dataset.transform = lambda sample: seen.append(int(trainer.train_dataset.epoch)) or transform(sample)
    trainer.train()
    assert seen == [0] * 5 + [1] * 5


def test_optimization_is_the_recipes(processor, tmp_path):
    optimization = OptimizationSection(learning_rate=1e-3, max_steps=5, batch_size=2, decay_at=(0.4, 0.8))
    trainer = make_trainer(tmp_path, processor, optimization=optimization, save_strategy="no")
    trainer.train()
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.05}
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-3, 1e-4}
    np.testing.assert_allclose(logged(trainer, "learning_rate"), [1e-3, 1e-3, 1e-4, 1e-4, 1e-5])


def test_terms_are_averaged_over_the_steps_since_the_last_entry(processor, tmp_path):
    single = make_trainer(tmp_path / "single", processor, max_steps=4, save_strategy="no")
    single.train()
    double = make_trainer(tmp_path / "double", processor, max_steps=4, save_strategy="no", logging_steps=2)
    double.train()
    for name in ("loss", "loss_cross_entropy", "loss_mask", "loss_dice"):
        values = logged(single, name)
        expected = [(values[0] + values[1]) / 2, (values[2] + values[3]) / 2]
        np.testing.assert_allclose(logged(double, name), expected, rtol=1e-5)
    assert not logged(single, "non_finite_costs") and not logged(single, "skipped_images")


def test_faults_are_counted_in_the_log(processor, tmp_path):
    trainer = make_trainer(tmp_path, processor, max_steps=1, train=Squares(skipped=("a.png", "b.png")))
    trainer.model.criterion.matcher.non_finite_costs = 3
    trainer.train()
    assert logged(trainer, "skipped_images") == [2]
    assert logged(trainer, "non_finite_costs") == [3]


def test_evaluation_is_the_evaluators(processor, tmp_path):
    trainer = make_trainer(tmp_path, processor)
    metrics = trainer.evaluate()
    results = evaluate(trainer.model, processor, Squares(2), tasks=("panoptic", "instance", "semantic"))
    assert metrics["eval_pq"] == results["panoptic"]["All"]["pq"]
    assert metrics["eval_pq_stuff"] == results["panoptic"]["Stuff"]["pq"]
    assert metrics["eval_ap"] == results["instance"]["AP"]
    assert metrics["eval_miou"] == results["semantic"]["mIoU"] > 0
    assert metrics["eval_images"] == 2
    both = trainer.evaluate({"one": Squares(1), "two": Squares(2)})
    assert (both["eval_one_images"], both["eval_two_images"]) == (1, 2)


class Scores(TrainerCallback):
    """Puts given scores in place of PQ, one for each evaluation."""

    def __init__(self, *scores: float):
        self.scores = list(scores)

    def on_evaluate(self, args, state, control, metrics, **references):
        metrics["eval_pq"] = self.scores.pop(0)


def test_the_best_checkpoint_is_kept_and_loaded(processor, tmp_path):
    trainer = make_trainer(
        tmp_path,
        processor,
        callbacks=[Scores(0.1, 0.3, 0.2)],
        eval_strategy="steps",
        eval_steps=2,
        max_steps=6,
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("pq", True)
    trainer.train()
    best = tmp_path / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    saved = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(best)
    for actual, expected in zip(trainer.model.parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


def test_the_best_checkpoint_is_found_where_the_folder_was_moved_to(processor, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    make_trainer(tmp_path / "first", processor, callbacks=[Scores(0.3, 0.2)], max_steps=4, **options).train()
    (tmp_path / "first").rename(tmp_path / "moved")
    resumed = make_trainer(tmp_path / "moved", processor, callbacks=[Scores(0.1)], max_steps=6, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-2")


def test_the_average_of_the_best_checkpoint_is_loaded(processor, tmp_path):
    optimization = OptimizationSection(learning_rate=1e-2, max_steps=4, batch_size=2, ema=0.5)
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "load_best_model_at_end": True}
    trainer = make_trainer(tmp_path, processor, optimization=optimization, callbacks=[Scores(0.3, 0.2)], **options)
    trainer.train()
    average = load_file(tmp_path / "checkpoint-2" / "average.safetensors")
    torch.testing.assert_close(trainer.model.class_predictor.weight, average["module.class_predictor.weight"])


def test_early_stopping(processor, tmp_path):
    callbacks = [Scores(0.3, 0.2, 0.1, 0.0), EarlyStoppingCallback(2)]
    trainer = make_trainer(tmp_path, processor, callbacks=callbacks, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert trainer.state.global_step == 3


def test_the_end_is_evaluated(processor, tmp_path):
    trainer = make_trainer(tmp_path, processor, eval_strategy="steps", eval_steps=4, save_strategy="no")
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_pq" in entry] == [4, 5]


@pytest.mark.parametrize("backbone", [TINY_SWIN, TINY_RESNET], ids=["swin", "resnet"])
def test_the_average_is_evaluated_and_returned(processor, tmp_path, backbone):
    optimization = OptimizationSection(learning_rate=1e-2, max_steps=3, batch_size=2, ema=0.5)
    model = model_of_squares(backbone_config=dict(backbone))
    trainer = make_trainer(tmp_path, processor, model, optimization, max_steps=3, save_steps=3)
    trainer.train()
    average = evaluate(trainer.ema.module, processor, Squares(2))
    assert trainer.evaluate()["eval_miou"] == average["semantic"]["mIoU"]
    last = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "checkpoint-3")
    name = "class_predictor.weight"
    assert not torch.equal(last.get_parameter(name), trainer.model.get_parameter(name))
    torch.testing.assert_close(trainer.model.get_parameter(name), trainer.ema.module.get_parameter(name))


def test_a_killed_save_is_no_checkpoint(processor, tmp_path):
    """Whatever a killed process leaves is not resumed from, and is gone after the next checkpoint."""
    make_trainer(tmp_path, processor, max_steps=2).train()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / ".unfinished" / "checkpoint-4")
    (tmp_path / ".unfinished" / "checkpoint-4" / "trainer_state.json").unlink()
    trainer = make_trainer(tmp_path, processor, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_a_checkpoint_of_that_name_is_replaced(processor, tmp_path):
    old = tmp_path / "checkpoint-2"
    old.mkdir()
    (old / "other").write_text("of another training")
    make_trainer(tmp_path, processor, max_steps=2).train()
    assert not (old / "other").exists() and (old / "optimizer.pt").exists()


def test_faults_of_other_callbacks_are_not_the_checkpoints(processor, tmp_path):
    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, **references):
            raise ValueError("no connection")

    make_trainer(tmp_path, processor, max_steps=2).train()
    with pytest.raises(ValueError, match=r"^no connection$"):
        make_trainer(tmp_path, processor, callbacks=[Tracker()]).train(resume_from_checkpoint=True)


def test_an_average_begins_with_the_weights_of_a_checkpoint_without_one(processor, tmp_path):
    averages = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **references):
            averages.append({name: tensor.clone() for name, tensor in trainer.ema.module.state_dict().items()})

    make_trainer(tmp_path, processor, max_steps=2).train()
    optimization = OptimizationSection(learning_rate=1e-3, max_steps=5, batch_size=2, ema=0.9)
    model = model_of_squares(seed=1)
    trainer = make_trainer(tmp_path, processor, model, optimization, callbacks=[Watch()], max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    saved = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    [average] = averages
    assert average.keys() == saved.keys() and all(torch.equal(average[name], saved[name]) for name in saved)


def test_what_a_checkpoint_says_of_itself_is_true_in_its_place(processor, tmp_path):
    trainer = make_trainer(tmp_path, processor, max_steps=2, save_total_limit=3)
    trainer.train()
    arguments = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert arguments.output_dir == trainer.args.output_dir == str(tmp_path)
    assert arguments.save_total_limit == trainer.args.save_total_limit == 3


def test_a_checkpoint_of_another_model_is_refused(processor, tmp_path):
    make_trainer(tmp_path, processor, max_steps=2).train()
    trainer = make_trainer(tmp_path, processor, model_of_squares(num_queries=3))
    with pytest.raises(CheckpointError, match=r"cannot resume from .*checkpoint-2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.9", reason="this PyTorch cannot load an optimizer to cpu:0")
def test_two_processes(processor, tmp_path):
    """They measure what one measures, log the same, and resume to the same path."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    whole, resumed, averaged = json.loads((tmp_path / "results.json").read_text())
    assert len(whole) == len(resumed) == 3
    np.testing.assert_allclose(resumed, whole, rtol=0, atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "checkpoint-2").glob("rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    model = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "checkpoint-3")
    alone = make_trainer(tmp_path / "alone", processor, model).evaluate()
    for name in ("eval_pq", "eval_ap", "eval_miou", "eval_images"):
        assert averaged[name] == pytest.approx(alone[name])


def train_in_this_process(folder: Path) -> None:
    """What each process of `test_two_processes` does."""
    processor = ProScaleMask2FormerImageProcessorPil(do_resize=False, label_ids_to_fuse=[3])
    options = {"max_steps": 3, "per_device_train_batch_size": 1, "ddp_find_unused_parameters": False}
    whole = make_trainer(folder, processor, **options)
    whole.train()
    resumed = make_trainer(folder / "resumed", processor, model_of_squares(seed=1), **options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    metrics = whole.evaluate()
    losses = [
        [[entry[name] for name in ("loss", *LOSS_TERMS)] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (whole, resumed)
    ]
    if whole.args.should_save:
        (folder / "results.json").write_text(json.dumps([*losses, metrics]))
    whole.accelerator.end_training()


def test_examples_without_an_object_are_refused(processor, tmp_path):
    trainer = make_trainer(tmp_path, processor)
    masks = torch.full((1, 32, 32), 255, dtype=torch.uint8)  # 0 and 255 in place of 0 and 1
    trainer.train_dataset = [{"pixel_values": None, "mask_labels": masks, "class_labels": torch.tensor([0])}] * 4
    with pytest.raises(ValueError, match=r"nothing to train on: none of the 4 images .* the value 1, not 255"):
        trainer.train()


def test_settings_of_a_recipe():
    recipe = Recipe(optimization=OptimizationSection(max_steps=9, batch_size=16, device_batch_size=2, precision="bf16"))
    settings = training_settings(recipe, processes=4)
    assert (settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]) == (2, 2)
    assert settings["bf16"] and not settings["fp16"] and settings["max_grad_norm"] == 0.01
    assert "eval_strategy" not in settings
    recipe.data = DataSection(validation={"name": "folder"})
    assert training_settings(recipe, processes=4)["eval_steps"] == 5000
    with pytest.raises(RecipeError, match="16 is no multiple of"):
        training_settings(recipe, processes=3)


def test_several_gpus_in_one_process_are_refused(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda arguments: 2))
    with pytest.raises(ValueError, match="accelerate launch"):
        make_trainer(tmp_path, processor)


if __name__ == "__main__":
    train_in_this_process(Path(sys.argv[1]))
