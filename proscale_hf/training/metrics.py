"""Measures of segmentation for transformers' `Trainer`, batch by batch."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from proscale_hf.data.sample import Sample
from proscale_hf.evaluation.evaluator import Evaluator
from proscale_hf.processing.packed_masks import unpack_masks
from proscale_hf.processing.run_length import encode_mask
from proscale_hf.processing.segment_ids import VOID_ID
from proscale_hf.training.measures import headline


OUTPUT_NAMES = ("class_queries_logits", "masks_queries_logits", "image_sizes", "padded_sizes")
NAMES_WITHOUT_PIXEL_MASK = ("class_queries_logits", "masks_queries_logits", "padded_sizes")


class SegmentationMetrics:
    """`compute_metrics` of a plain `Trainer`, in one process:

        Trainer(
            compute_metrics=SegmentationMetrics(image_processor, categories),
            args=TrainingArguments(
                batch_eval_metrics=True, include_for_metrics=["inputs"], label_names=["class_labels"], ...
            ),
        )

    The truth is read from the batches themselves, since accelerate cuts objects off `label_ids` where the last batch is
    smaller than the others. It is compared at the size that the model sees, without padding; `SegmentationTrainer`
    compares at the size of the original image.

    Batches are counted and forgotten: for panoptic and semantic quality only sums per class remain, for average
    precision the scores of what was predicted.

    Args:
        image_processor: it post-processes the logits.
        categories: COCO-panoptic category dicts with "id", "name" and "isthing", in label order.
        tasks: some of "panoptic", "instance" and "semantic". Where objects overlap, "instance" is the only one.
    """

    def __init__(
        self,
        image_processor: Any,
        categories: Sequence[Mapping[str, Any]],
        tasks: Collection[str] = ("panoptic", "semantic"),
    ):
        self.image_processor = image_processor
        self.evaluator = Evaluator(categories, tasks)

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float] | None:
        """
        Args:
            prediction: `EvalPrediction` of one batch; its `inputs` have `class_labels`, and `mask_labels` or
                `packed_masks`.
            compute_result: whether this is the last batch.

        Returns:
            After the last batch, the measures of all batches, named as by `SegmentationTrainer.evaluate`, without the
            prefix. Before, None.

        Raises:
            ValueError: `Trainer` did not hand over the inputs, several processes evaluate, or objects overlap though
                other tasks than "instance" are measured.
        """
        inputs = prediction.inputs
        if inputs is None:
            raise ValueError('SegmentationMetrics needs TrainingArguments(include_for_metrics=["inputs"]).')
        names = OUTPUT_NAMES if len(prediction.predictions) > 3 else NAMES_WITHOUT_PIXEL_MASK
        outputs = dict(zip(names, prediction.predictions, strict=False))
        class_labels = inputs["class_labels"]
        if len(class_labels) != len(outputs["class_queries_logits"]):
            raise ValueError("SegmentationMetrics works in one process; SegmentationTrainer evaluates in several.")
        if inputs.get("packed_masks") is not None:
            masks = [
                unpack_masks(planes, len(c)) for planes, c in zip(inputs["packed_masks"], class_labels, strict=True)
            ]
        else:
            masks = inputs["mask_labels"]
        sizes = outputs.get("image_sizes", [None] * len(masks))
        images = zip(masks, class_labels, sizes, strict=True)
        self.evaluator.update(
            [
                self._sample(f"image {number}", image_masks, labels.tolist(), size)
                for number, (image_masks, labels, size) in enumerate(images, start=self.evaluator.images)
            ],
            outputs,
            self.image_processor,
        )
        if not compute_result:
            return None
        results = summary(self.evaluator.compute() | {"skipped": []})
        self.evaluator.reset()
        return results

    def _sample(self, name: str, masks: torch.Tensor, labels: list[int], size: torch.Tensor | None) -> Sample:
        """The truth of an image: `masks` (objects, height, width) and its size without padding."""
        height, width = masks.shape[1:] if size is None else size.tolist()
        inside = (masks[:, :height, :width] == 1).cpu().numpy()
        image = Image.new("RGB", (width, height))  # measures look at its size alone
        segments = [
            {"id": number, "label_id": label, "iscrowd": 0, "area": int(mask.sum())}
            for number, (label, mask) in enumerate(zip(labels, inside, strict=True), start=1)
        ]
        if self.evaluator.tasks == ["instance"]:
            return Sample(image, name, name, segments, masks=[encode_mask(mask) for mask in inside])
        if (inside.sum(0) > 1).any():
            raise ValueError('The objects of an image overlap, so only tasks=("instance",) can be measured.')
        segment_map = np.full((height, width), VOID_ID, dtype=np.int32)
        for segment, mask in zip(segments, inside, strict=True):
            segment_map[mask] = segment["id"]
        return Sample(image, name, name, [segment for segment in segments if segment["area"]], segment_map)


def summary(results: Mapping[str, Any]) -> dict[str, float]:
    """The main numbers of an evaluation, named in `Trainer`'s style.

    Returns:
        The measures of the tasks: `pq`, `sq`, `rq`, `pq_things`, `pq_stuff`, `ap`, `ap50`, `miou`.
    """
    return {name.lower().replace(" ", "_"): value for name, value in headline(results).items()}
