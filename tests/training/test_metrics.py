"""`SegmentationMetrics`, which measures in a plain `Trainer`."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from proscale_hf import ProScaleMask2FormerImageProcessorPil


pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("pycocotools")

from transformers import Trainer, TrainingArguments

from proscale_hf.data.collate import TrainingTransform, TransformedDataset, collate
from proscale_hf.data.sample import Sample
from proscale_hf.evaluation.evaluator import evaluate
from proscale_hf.training.metrics import SegmentationMetrics
from squares import CATEGORIES, Squares, model_of_squares


@pytest.fixture
def processor() -> ProScaleMask2FormerImageProcessorPil:
    return ProScaleMask2FormerImageProcessorPil(do_resize=False, label_ids_to_fuse=[3])


@pytest.mark.parametrize("packed", [False, True])
def test_metrics_of_a_plain_trainer(processor, tmp_path, packed):
    """The same as an evaluation at the original size, which is the size of these batches."""

    def with_mask_labels(samples: list[Sample]) -> dict:
        return processor(
            [sample.image for sample in samples],
            segmentation_maps=[sample.segment_map for sample in samples],
            instance_id_to_semantic_id=[{s["id"]: s["label_id"] for s in sample.segments} for sample in samples],
            return_tensors="pt",
        ).data

    processor.ignore_index = 0
    dataset = TransformedDataset(Squares(), TrainingTransform(None, processor)) if packed else Squares()
    trainer = Trainer(
        model=model_of_squares(),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            batch_eval_metrics=True,
            include_for_metrics=["inputs"],
            label_names=["class_labels"],
            per_device_eval_batch_size=2,
            remove_unused_columns=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,
        ),
        eval_dataset=dataset,
        data_collator=collate if packed else with_mask_labels,
        compute_metrics=SegmentationMetrics(processor, CATEGORIES),
    )
    expected = evaluate(trainer.model, processor, Squares(), tasks=("panoptic", "semantic"), batch_size=2)
    for _ in range(2):  # the second time begins anew
        metrics = trainer.evaluate()
        assert np.isfinite(metrics["eval_loss"])
        assert metrics["eval_pq"] == pytest.approx(expected["panoptic"]["All"]["pq"])
        assert metrics["eval_miou"] == pytest.approx(expected["semantic"]["mIoU"])
    assert metrics["eval_miou"] > 0


def prediction_of(masks: torch.Tensor, labels: list[int]) -> SimpleNamespace:
    """A batch of one image whose objects (objects, height, width) are predicted as they are."""
    class_logits = torch.full((1, len(labels), len(CATEGORIES) + 1), -9.0)
    class_logits[0, torch.arange(len(labels)), labels] = 9.0
    mask_logits = masks[None, :, ::4, ::4].float() * 18 - 9
    inputs = {"mask_labels": [masks], "class_labels": [torch.tensor(labels)]}
    return SimpleNamespace(predictions=(class_logits, mask_logits), inputs=inputs)


def size_of(value: Any) -> int:
    """Bytes of numbers and arrays in a measure's state."""
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(size_of, value))
    return np.asarray(value).nbytes


def test_metrics_keep_nothing_of_an_image(processor):
    masks = torch.zeros((2, 64, 64), dtype=torch.uint8)
    masks[0, :32, :32] = masks[1, 32:] = 1
    metrics = SegmentationMetrics(processor, CATEGORIES)

    def state() -> int:
        return size_of([measure.state() for measure in metrics.evaluator.measures.values()])

    metrics(prediction_of(masks, [0, 3]), compute_result=False)
    after_one = state()
    for _ in range(20):
        metrics(prediction_of(masks, [0, 3]), compute_result=False)
    assert state() == after_one
    assert metrics(prediction_of(masks, [0, 3]), compute_result=True)["pq"] == pytest.approx(1.0, abs=1e-3)


def test_metrics_say_what_they_lack(processor):
    masks = torch.zeros((1, 64, 64), dtype=torch.uint8)
    metrics = SegmentationMetrics(processor, CATEGORIES)
    prediction = prediction_of(masks, [0])
    with pytest.raises(ValueError, match="include_for_metrics"):
        metrics(SimpleNamespace(predictions=prediction.predictions, inputs=None), compute_result=True)
    twice = tuple(logits.repeat_interleave(2, 0) for logits in prediction.predictions)
    with pytest.raises(ValueError, match="one process"):
        metrics(SimpleNamespace(predictions=twice, inputs=prediction.inputs), compute_result=True)


def test_metrics_of_instances_that_overlap(processor):
    masks = torch.zeros((2, 64, 64), dtype=torch.uint8)
    masks[0, :32], masks[1, 16:48] = 1, 1
    metrics = SegmentationMetrics(processor, CATEGORIES, tasks=("instance",))
    one = prediction_of(masks, [0, 1])
    assert metrics(one, compute_result=True)["ap"] == pytest.approx(1.0)
    two = SimpleNamespace(
        predictions=tuple(logits.repeat_interleave(2, 0) for logits in one.predictions),
        inputs={name: values * 2 for name, values in one.inputs.items()},
    )
    assert metrics(two, compute_result=True)["ap"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="overlap"):
        SegmentationMetrics(processor, CATEGORIES)(prediction_of(masks, [0, 1]), compute_result=True)
