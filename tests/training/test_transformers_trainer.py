"""transformers' `Trainer` with this model: training, evaluation in batches, checkpoints, resuming."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from helpers import TINY_RESNET, TINY_SWIN, tiny_model
from proscale_hf import ProScaleMask2FormerForUniversalSegmentation, ProScaleMask2FormerImageProcessorPil


pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments


SIZES = [(64, 80), (50, 64), (64, 64), (40, 90)]
QUERIES, LABELS = 7, 4


class Squares(torch.utils.data.Dataset):
    """Noise with 3, 2, 1 and no bright squares; id 0 of the maps is void."""

    def __len__(self) -> int:
        return len(SIZES)

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng(index)
        image = random.integers(0, 50, (*SIZES[index], 3), dtype=np.uint8)
        instance_map = np.zeros(SIZES[index], dtype=np.uint8)
        for instance in range(1, len(SIZES) - index):
            top, left = random.integers(0, min(SIZES[index]) - 16, 2)
            instance_map[top : top + 16, left : left + 16] = instance
            image[top : top + 16, left : left + 16, instance % 3] = 200
        return {"image": image, "instance_map": instance_map}


@pytest.fixture
def processor() -> ProScaleMask2FormerImageProcessorPil:
    return ProScaleMask2FormerImageProcessorPil(do_resize=False, ignore_index=0)


class CountInstances:
    """Gets the evaluation's batches one by one, keeps them, and post-processes them."""

    def __init__(self, processor: ProScaleMask2FormerImageProcessorPil):
        self.processor = processor
        self.batches: list[tuple] = []
        self.results: list[dict] = []

    def __call__(self, evaluation: Any, compute_result: bool) -> dict[str, float] | None:
        self.batches.append((evaluation.predictions, evaluation.label_ids))
        class_logits, mask_logits, image_sizes, padded_sizes = evaluation.predictions
        self.results += self.processor.post_process_instance_segmentation(
            SimpleNamespace(
                class_queries_logits=class_logits,
                masks_queries_logits=mask_logits,
                image_sizes=image_sizes,
                padded_sizes=padded_sizes,
            ),
            threshold=0.0,
            target_sizes=image_sizes,
            return_binary_maps=True,
        )
        if compute_result:
            return {"instances": sum(len(result["segments_info"]) for result in self.results)}


def make_trainer(
    folder: Path, processor: ProScaleMask2FormerImageProcessorPil, model: torch.nn.Module, **arguments: Any
) -> Trainer:
    def collate(examples: list[dict]) -> dict:
        return processor(
            [example["image"] for example in examples],
            segmentation_maps=[example["instance_map"] for example in examples],
            instance_id_to_semantic_id={1: 0, 2: 1, 3: 2},
            return_tensors="pt",
        ).data

    settings = {
        "max_steps": 3,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "eval_do_concat_batches": False,
        "batch_eval_metrics": True,
        "remove_unused_columns": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "disable_tqdm": True,
        **arguments,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=Squares(),
        eval_dataset=Squares(),
        data_collator=collate,
        processing_class=processor,
        compute_metrics=CountInstances(processor),
    )


def logged_losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits_of(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        output = model.eval()(batch["pixel_values"], pixel_mask=batch["pixel_mask"])
    return output.class_queries_logits, output.masks_queries_logits


def test_training_changes_the_weights_and_a_checkpoint_keeps_them(processor, tmp_path):
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(tmp_path, processor, model, save_steps=3)
    trainer.train()
    losses = logged_losses(trainer)
    assert len(losses) == 3 and np.isfinite(losses).all()
    unchanged = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert all(".swin.layernorm." in name for name in unchanged)  # a backbone has no use for Swin's last norm

    reloaded = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "checkpoint-3")
    batch = next(iter(trainer.get_eval_dataloader()))
    torch.testing.assert_close(logits_of(reloaded, batch), logits_of(trainer.model, batch), rtol=0, atol=1e-5)
    saved = ProScaleMask2FormerImageProcessorPil.from_pretrained(tmp_path / "checkpoint-3")
    assert saved.to_dict() == processor.to_dict()


def test_evaluation_hands_over_logits_and_labels_batch_by_batch(processor, tmp_path):
    trainer = make_trainer(tmp_path, processor, tiny_model())
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"])
    count_instances = trainer.compute_metrics
    dataloader = trainer.get_eval_dataloader()
    assert [len(predictions[0]) for predictions, _ in count_instances.batches] == [3, 1]
    for (predictions, (mask_labels, class_labels)), batch in zip(count_instances.batches, dataloader, strict=True):
        size, (height, width) = len(batch["pixel_values"]), batch["pixel_values"].shape[-2:]
        assert predictions[0].shape == (size, QUERIES, LABELS + 1)
        assert predictions[1].shape == (size, QUERIES, height // 4, width // 4)
        torch.testing.assert_close(predictions[:2], logits_of(trainer.model, batch), rtol=0, atol=1e-5)
        torch.testing.assert_close(list(mask_labels), batch["mask_labels"])
        torch.testing.assert_close(list(class_labels), batch["class_labels"])

    assert metrics["eval_instances"] == sum(len(result["segmentation"]) for result in count_instances.results) > 0
    for result, size in zip(count_instances.results, SIZES, strict=True):
        assert result["segmentation"].dtype == torch.bool
        assert result["segmentation"].shape == (len(result["segments_info"]), *size)
        assert result["segmentation"].flatten(1).any(1).all()


@pytest.mark.parametrize("backbone_config", [TINY_SWIN, TINY_RESNET], ids=["swin", "resnet"])
def test_a_resumed_training_is_the_same_training(processor, tmp_path, backbone_config):
    """Three steps at once against two steps, a restart, and one more step."""
    whole = make_trainer(tmp_path, processor, tiny_model(backbone_config=dict(backbone_config)))
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    models = {
        "as at first": tiny_model(backbone_config=dict(backbone_config)),
        "the checkpoint": ProScaleMask2FormerForUniversalSegmentation.from_pretrained(checkpoint),
    }
    for start, model in models.items():
        resumed = make_trainer(tmp_path / start, processor, model)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.state.global_step == 3
        assert logged_losses(resumed) == pytest.approx(logged_losses(whole), rel=1e-5)
        weights = resumed.model.state_dict()
        for name, expected in whole.model.state_dict().items():
            # Adam makes a step of what is left by rounding where a gradient is 0, at a bias before a norm for example
            torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-4)


@dataclass
class Logits:
    class_queries_logits: torch.Tensor
    masks_queries_logits: torch.Tensor


def test_calls_of_transformers_own_example_scripts(tmp_path):
    """One picture at a time, its background taken out of the classes; batches stacked, without `pixel_mask`."""
    options = {"do_reduce_labels": True, "reduce_labels": True}
    processor = ProScaleMask2FormerImageProcessorPil(do_resize=True, size={"height": 64, "width": 96}, **options)
    names = {0: "red", 1: "green", 2: "blue", 3: "other"}
    results = []

    def example(example: dict) -> dict:
        instances = example["instance_map"]
        pairs = np.unique(np.stack((instances, instances), axis=-1).reshape(-1, 2), axis=0)
        inputs = processor(
            images=[example["image"]],
            segmentation_maps=[instances],
            instance_id_to_semantic_id={instance: semantic for semantic, instance in pairs},
            return_tensors="pt",
        )
        return {key: inputs[key][0] for key in ("pixel_values", "mask_labels", "class_labels")}

    def collate(examples: list[dict]) -> dict:
        parts = [example(one) for one in examples]
        batch = {key: [part[key] for part in parts] for key in ("mask_labels", "class_labels")}
        return {"pixel_values": torch.stack([part["pixel_values"] for part in parts]), **batch}

    def measure(evaluation: Any, compute_result: bool) -> dict[str, float] | None:
        sizes = [masks.shape[-2:] for masks in evaluation.label_ids[0]]
        results.extend(
            processor.post_process_instance_segmentation(
                Logits(*evaluation.predictions[:2]), threshold=0.0, target_sizes=sizes, return_binary_maps=True
            )
        )
        return {"instances": sum(len(result["segments_info"]) for result in results)} if compute_result else None

    trainer = make_trainer(tmp_path, processor, tiny_model(id2label=names), max_steps=2)
    trainer.data_collator, trainer.compute_metrics = collate, measure
    trainer.train()
    assert np.isfinite(logged_losses(trainer)).all()
    assert trainer.evaluate()["eval_instances"] > 0
    batch = collate([Squares()[0]])
    assert batch["class_labels"][0].tolist() == [0, 1, 2]
    assert batch["pixel_values"].shape == (1, 3, 64, 96) and batch["mask_labels"][0].shape == (3, 64, 96)
    assert len(results) == len(SIZES)
    assert all(result["segmentation"].shape[-2:] == (64, 96) for result in results if result["segments_info"])
