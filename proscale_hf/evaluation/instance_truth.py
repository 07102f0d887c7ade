"""The true instances of an image: the things of its own annotation, or what a COCO instance JSON says of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proscale_hf.data.dataset import SegmentationDataset
from proscale_hf.data.sample import Sample, SampleError
from proscale_hf.data.sources.coco import CocoInstance
from proscale_hf.files.text import few
from proscale_hf.processing.run_length import encode_mask


try:
    from pycocotools import mask as coco_mask
except ImportError as error:
    raise ImportError('Evaluation needs pycocotools: pip install "proscale-hf[evaluate]"') from error


class ThingSegments:
    """Takes all segments that are things, crowds among them, for the instances.

    Args:
        categories: of the data set, in label order.
    """

    def __init__(self, categories: Sequence[Mapping[str, Any]]):
        self.thing_ids = {label: category["id"] for label, category in enumerate(categories) if category["isthing"]}

    def __call__(self, sample: Sample) -> dict[str, list]:
        """
        Returns:
            `{"masks": COCO run-length codes, "labels": category ids, "iscrowd": 0 or 1, "area": pixels}`, lists with a
            value for each instance.
        """
        things = [(i, segment) for i, segment in enumerate(sample.segments) if segment["label_id"] in self.thing_ids]
        if sample.masks is None:
            masks = [encode_mask(sample.segment_map == segment["id"]) for _, segment in things]
            areas = [int(coco_mask.area(mask)) for mask in masks]  # a list of more than 255 overflows
        else:
            masks = [sample.masks[index] for index, _ in things]
            areas = [segment["area"] for _, segment in things]
        return truths_of([segment for _, segment in things], self.thing_ids, masks, areas)


class InstanceAnnotations:
    """Takes the annotations of a COCO instance JSON, as the paper does for COCO: they are finer, and overlap.

    Args:
        annotations: the JSON file; it must list every image that is evaluated.
        categories: of the data set, in label order; the JSON's are found among its things by name.

    Raises:
        ValueError: the file cannot be used, or has a category that is no thing of the data set.
    """

    def __init__(self, annotations: str | Path, categories: Sequence[Mapping[str, Any]]):
        self.annotations = Path(annotations)
        source = CocoInstance(images=self.annotations.parent, annotations=self.annotations)  # images are not read
        thing_ids = {category["name"]: category["id"] for category in categories if category["isthing"]}
        names = [category["name"] for category in source.categories]
        if unknown := [name for name in names if name not in thing_ids]:
            raise ValueError(f"{annotations} has categories that are no things of the data set: {few(unknown)}.")
        self.category_ids = {label: thing_ids[name] for label, name in enumerate(names)}
        self.source = source
        self.rows = SegmentationDataset(source).rows
        self.row_of = {image_id: index for index, image_id in enumerate(self.rows["image_id"])}

    def __call__(self, sample: Sample) -> dict[str, list]:
        """
        Returns:
            as `ThingSegments`.

        Raises:
            SampleError: the JSON does not list the image.
        """
        if sample.image_id not in self.row_of:
            raise SampleError(f"{self.annotations} does not list image {sample.image_id} ({sample.file_name}).")
        row = self.rows[self.row_of[sample.image_id]]
        segments, masks = self.source.read_masks(row, (sample.image.height, sample.image.width))
        return truths_of(segments, self.category_ids, masks, [segment["area"] for segment in segments])


def truths_of(
    segments: Sequence[Mapping[str, Any]],
    category_ids: Mapping[int, int],
    masks: Sequence[Mapping[str, Any]],
    areas: Sequence[float],
) -> dict[str, list]:
    return {
        "masks": list(masks),
        "labels": [category_ids[segment["label_id"]] for segment in segments],
        "iscrowd": [segment["iscrowd"] for segment in segments],
        "area": list(areas),
    }
