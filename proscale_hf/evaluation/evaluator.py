"""Panoptic, instance and semantic quality of one model, from one pass over a data set.

The protocol is the paper's (section 4): a model trained on panoptic annotations alone gives all three kinds of
results, measured as

- PQ, SQ and RQ of its panoptic segmentation, by the rules of COCO-panoptic;
- AP^p: mask AP of its instances, over the things. The truth is the data set's, or that of a COCO instance JSON;
- mIoU^p: mean IoU of its semantic segmentation. The truth is the class of each pixel, crowds included.

Each image is segmented at its original size, counted and forgotten; what stays is what the measures keep.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from proscale_hf.data.dataset import SegmentationDataset
from proscale_hf.data.sample import Sample, SampleError
from proscale_hf.evaluation.agreement import TASKS, check_tasks, choose_tasks, match_labels
from proscale_hf.evaluation.average_precision import MaskAveragePrecision
from proscale_hf.evaluation.batches import BatchShare, Preparation, ReadableSamples
from proscale_hf.evaluation.coco_files import PredictionFiles
from proscale_hf.evaluation.instance_truth import InstanceAnnotations, ThingSegments
from proscale_hf.evaluation.mean_iou import MeanIoU
from proscale_hf.evaluation.panoptic_quality import PanopticQuality
from proscale_hf.processing.postprocessing import COCO_DETECTIONS


VOID_LABEL = -1


class Evaluator:
    """Counts batch by batch, and gives all measures of all tasks at the end.

    Args:
        categories: the data set's, in label order: COCO-panoptic category dicts with "id", "name" and "isthing".
        tasks: some of `TASKS`.
        label_map: for each label of the model the label of the data set, None where the data set lacks it; default:
            the labels are the same. See `match_labels`.
        instance_annotations: the truth of the instance task; default: the things of each sample.
        files: write the predictions; default: they are not written.
    """

    def __init__(
        self,
        categories: Sequence[Mapping[str, Any]],
        tasks: Collection[str] = TASKS,
        label_map: Sequence[int | None] | None = None,
        instance_annotations: InstanceAnnotations | None = None,
        files: PredictionFiles | None = None,
    ):
        check_tasks(tasks)
        self.categories = list(categories)
        self.tasks = [task for task in TASKS if task in tasks]
        self.label_map = list(range(len(categories))) if label_map is None else list(label_map)
        self.category_ids = [None if label is None else categories[label]["id"] for label in self.label_map]
        self.stuff_labels = [  # of the model
            label for label, own in enumerate(self.label_map) if own is not None and not categories[own]["isthing"]
        ]
        self.true_instances = instance_annotations or ThingSegments(categories)
        self.files = files
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self.measures = {task: COUNTING[task].new_measure(self.categories) for task in self.tasks}
        self.images = 0

    def update(self, samples: Sequence[Sample], outputs: Any, image_processor: Any) -> None:
        """Count one batch.

        Args:
            samples: the images with their truth.
            outputs: the model's, for these images in this order: a mapping with "class_queries_logits" and
                "masks_queries_logits", and "image_sizes" and "padded_sizes" as the model gives them.
            image_processor: the one that made the batch.

        Raises:
            ValueError: the logits hold NaN.
        """
        for index, sample in enumerate(samples):
            output = {
                name: outputs[name][index : index + 1]
                for name in ("class_queries_logits", "masks_queries_logits", "image_sizes", "padded_sizes")
                if outputs.get(name) is not None
            }
            options = {"target_sizes": [(sample.image.height, sample.image.width)]}
            for task in self.tasks:
                COUNTING[task].count(self, sample, output, image_processor, options)
            self.images += 1

    def _panoptic(self, sample: Sample, output: Any, image_processor: Any, options: dict[str, Any]) -> None:
        result = image_processor.post_process_panoptic_segmentation(
            output, label_ids_to_fuse=self.stuff_labels, **options
        )[0]
        segment_map = result["segmentation"].cpu().numpy()
        segments = [
            {"id": segment["id"], "category_id": self.category_ids[segment["label_id"]]}
            for segment in result["segments_info"]
        ]
        true_segments = [
            {
                "id": segment["id"],
                "category_id": self.categories[segment["label_id"]]["id"],
                "iscrowd": segment["iscrowd"],
            }
            for segment in sample.segments
        ]
        self.measures["panoptic"].update(segment_map, segments, sample.segment_map, true_segments)
        if self.files is not None:
            self.files.add_panoptic(sample, segment_map, segments)

    def _instance(self, sample: Sample, output: Any, image_processor: Any, options: dict[str, Any]) -> None:
        result = image_processor.post_process_instance_segmentation(
            output,
            threshold=0.0,
            return_coco_annotation=True,
            top_k=COCO_DETECTIONS,
            label_ids_to_fuse=self.stuff_labels,
            **options,
        )[0]
        found = [
            {"category_id": self.category_ids[segment["label_id"]], "segmentation": mask, "score": segment["score"]}
            for mask, segment in zip(result["segmentation"], result["segments_info"], strict=True)
            if self.category_ids[segment["label_id"]] is not None
        ]
        predictions = {
            "masks": [instance["segmentation"] for instance in found],
            "scores": [instance["score"] for instance in found],
            "labels": [instance["category_id"] for instance in found],
        }
        self.measures["instance"].update(sample.image_id, predictions, self.true_instances(sample))
        if self.files is not None:
            self.files.add_instances(sample, found)

    def _semantic(self, sample: Sample, output: Any, image_processor: Any, options: dict[str, Any]) -> None:
        label_map = image_processor.post_process_semantic_segmentation(output, **options)[0].cpu().numpy()
        prediction = np.array(self.label_map)[label_map]
        self.measures["semantic"].update(prediction, sample.label_map(void=VOID_LABEL))
        if self.files is not None:
            self.files.add_semantic(sample, prediction)

    def state(self) -> dict[str, Any]:
        """All that was counted, as plain values that can be sent to another process."""
        return {"images": self.images, "measures": {task: measure.state() for task, measure in self.measures.items()}}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Count what another evaluator, of the same categories and tasks, has counted."""
        self.images += state["images"]
        for task, measure in self.measures.items():
            measure.merge(state["measures"][task])

    def gather(self, accelerator: Any) -> None:
        """Add up what all processes have counted; afterwards each process has the sum.

        Args:
            accelerator: the `accelerate.Accelerator` of this process; all processes must call this.
        """
        from accelerate.utils import gather_object

        states = gather_object([self.state()])
        self.reset()
        for state in states:  # in the same order everywhere, so that rounding is the same everywhere
            self.merge(state)

    def compute(self) -> dict[str, Any]:
        """`{"panoptic": ..., "instance": ..., "semantic": ...}` with what the measures give, and "images", how many."""
        return {**{task: measure.compute() for task, measure in self.measures.items()}, "images": self.images}


class Counting(NamedTuple):
    """How a task is evaluated.

    Attributes:
        new_measure: makes the task's measure for the categories of a data set.
        count: a method of `Evaluator` that adds the truth and the prediction of one image to the measure.
    """

    new_measure: Callable[[Sequence[Mapping[str, Any]]], Any]
    count: Callable[[Evaluator, Sample, Any, Any, dict[str, Any]], None]


def ids_of(categories: Sequence[Mapping[str, Any]], kinds: Collection[bool] = (True, False)) -> list[int]:
    """The ids of things (`True` in `kinds`) and of stuff (`False`), in label order."""
    return [category["id"] for category in categories if bool(category["isthing"]) in kinds]


# A further task needs a line here, and its name in `TASKS`.
COUNTING = {
    "panoptic": Counting(
        lambda categories: PanopticQuality(ids_of(categories, [True]), ids_of(categories, [False])),
        Evaluator._panoptic,
    ),
    "instance": Counting(
        lambda categories: MaskAveragePrecision(ids_of(categories, [True])),
        Evaluator._instance,
    ),
    "semantic": Counting(
        lambda categories: MeanIoU(len(categories), VOID_LABEL, names=ids_of(categories)),
        Evaluator._semantic,
    ),
}


def evaluate(
    model: torch.nn.Module,
    image_processor: Any,
    dataset: SegmentationDataset,
    *,
    tasks: Collection[str] | None = None,
    batch_size: int = 1,
    workers: int = 0,
    dtype: torch.dtype | None = None,
    accelerator: Any = None,
    instance_annotations: InstanceAnnotations | None = None,
    files: PredictionFiles | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Run a model over a data set once, and measure it.

    Args:
        model: runs on its device. Afterwards it is in the mode, training or evaluation, that it was in before.
        image_processor: the model's.
        dataset: its categories have the names of the model's labels. If its `on_error` is "skip", images that cannot be
            read are left out; else the first one is an error.
        tasks: some of `TASKS`; default: all tasks that the data set has the truth for.
        batch_size: images per batch and process. It changes the results by no more than rounding.
        workers: how many processes read and prepare images, for each process that runs the model.
        dtype: autocast's; default: autocast stays as it is.
        accelerator: an `accelerate.Accelerator` to share the work with other processes. Each must call this, and each
            gets the result, which is that of one process.
        instance_annotations: see `Evaluator`.
        files: see `Evaluator`.
        show_progress: a bar on stderr.

    Returns:
        see `Evaluator.compute`, and "skipped", one line for each image that was left out, "seconds", how long it took,
        and "images_per_second".

    Raises:
        ValueError: model and data set do not belong together, or an image or annotation cannot be used.
    """
    if accelerator is not None:
        model = accelerator.unwrap_model(model)
    tasks = choose_tasks(dataset, tasks, instance_annotations)
    stuff = model.config.stuff_label_ids(image_processor.label_ids_to_fuse)
    label_map = match_labels(model.config.id2label, stuff, dataset.categories, tasks)
    evaluator = Evaluator(dataset.categories, tasks, label_map, instance_annotations, files)
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    share = BatchShare(len(dataset), batch_size, rank, processes)
    loader = DataLoader(
        ReadableSamples(dataset),
        batch_sampler=share.batches,
        num_workers=workers,
        collate_fn=Preparation(image_processor),
    )
    device = next(model.parameters()).device
    precision = contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)
    skipped: list[str] = []
    was_training = model.training
    model.eval()
    start = time.perf_counter()
    try:
        with torch.no_grad(), progress_bar(len(dataset), show_progress and rank == 0) as bar:
            for is_counted, (samples, inputs, errors) in zip(share.is_counted, loader, strict=True):
                if errors and dataset.on_error == "raise":
                    raise SampleError(errors[0])
                with precision:
                    outputs = model(**inputs.to(device))
                if is_counted:
                    skipped += errors
                    evaluator.update(samples, outputs, image_processor)
                bar.update(processes * (len(samples) + len(errors)))
    finally:
        model.train(was_training)
    if accelerator is not None:
        from accelerate.utils import gather_object

        evaluator.gather(accelerator)
        skipped = gather_object(skipped)
    if evaluator.images == 0:
        raise SampleError(f"None of the {len(dataset)} images can be used: {'; '.join(skipped[:1])}")
    seconds = time.perf_counter() - start
    speed = evaluator.images / seconds
    return {**evaluator.compute(), "skipped": skipped, "seconds": seconds, "images_per_second": speed}


def progress_bar(images: int, is_shown: bool) -> tqdm:
    """On a terminal: how many images are done, and how fast."""
    return tqdm(total=images, unit=" images", disable=None if is_shown else True, leave=False)
