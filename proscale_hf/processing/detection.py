"""Detection: labels of COCO's annotations for training, and detections from logits and boxes. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from proscale_hf.layers.boxes import to_corners
from proscale_hf.processing.sizes import ImageSizes, Size


def detection_labels(annotations: Any, sizes: list[ImageSizes]) -> list[dict[str, np.ndarray]]:
    """
    Labels of a batch.

    Args:
        annotations: COCO's, one mapping for an image, or a list of one for each: `annotations`, a list of objects with
            `bbox` (left, top, width, height, in pixels of the image as it was given), `category_id`, and perhaps `area`
            and `iscrowd`; and perhaps `image_id`.
        sizes: of the images.

    Returns:
        For each image `class_labels`, int64 (objects,); `boxes`, float32 (objects, 4), x and y of the centre, width and
        height, as shares of the image; `area` in pixels of the image as it was given, float32 (objects,); `iscrowd`,
        int64 (objects,), always 0; `image_id`, int64 (1,), if it was given; and int64 (2,) `orig_size` and `size`,
        height and width of the image as it was given and in the batch. Boxes are clipped to the image. Crowds, and what
        has no area inside the image, are left out.

    Raises:
        ValueError: one line that names the image, and the box.
    """
    given = [annotations] if isinstance(annotations, Mapping) else list(annotations)
    if len(given) != len(sizes):
        raise ValueError(f"got {len(sizes)} images, but annotations for {len(given)}")
    return [_image_labels(image, size, f"image {i}") for i, (image, size) in enumerate(zip(given, sizes, strict=True))]


def _image_labels(image: Any, sizes: ImageSizes, name: str) -> dict[str, np.ndarray]:
    if not isinstance(image, Mapping) or not isinstance(image.get("annotations"), Sequence):
        raise ValueError(f"{name}: its annotations must be a mapping with `annotations`, a list of COCO's objects")
    height, width = sizes.original
    classes, boxes, areas = [], [], []
    for i, entry in enumerate(image["annotations"]):
        category, (left, top, box_width, box_height) = _checked(entry, f"{name}, box {i}")
        corners = np.clip([left, top, left + box_width, top + box_height], 0, [width, height, width, height])
        box = corners.astype(np.float64)
        size = box[2:] - box[:2]
        if entry.get("iscrowd") or size.min() <= 0:
            continue
        classes.append(category)
        boxes.append([*(box[:2] + size / 2) / (width, height), *size / (width, height)])
        areas.append(entry.get("area", box_width * box_height))
    labels = {
        "class_labels": np.array(classes, dtype=np.int64),
        "boxes": np.array(boxes, dtype=np.float32).reshape(-1, 4),
        "area": np.array(areas, dtype=np.float32),
        "iscrowd": np.zeros(len(classes), dtype=np.int64),
        "orig_size": np.array(sizes.original, dtype=np.int64),
        "size": np.array(sizes.resized, dtype=np.int64),
    }
    if "image_id" in image:
        labels["image_id"] = np.array([image["image_id"]], dtype=np.int64)
    return labels


def _checked(entry: Any, name: str) -> tuple[int, list[float]]:
    """The class and the box of an annotation."""
    if not isinstance(entry, Mapping) or not {"bbox", "category_id"} <= set(entry):
        raise ValueError(f"{name}: an annotation must have `bbox` and `category_id`")
    category = entry["category_id"]
    if int(category) != category or category < 0:
        raise ValueError(f"{name}: `category_id` must be a whole number of at least 0, got {category!r}")
    box = [float(number) for number in entry["bbox"]]
    if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
        raise ValueError(
            f"{name}: `bbox` must be left, top, width and height, four finite numbers of which the last two are not "
            f"below 0, got {box}"
        )
    return int(category), box


@torch.no_grad()
def best_detections(
    logits: torch.Tensor, boxes: torch.Tensor, target_sizes: Sequence[Size] | None, threshold: float, top_k: int
) -> list[dict[str, torch.Tensor]]:
    """
    The best pairs of query and class. A query may give several detections, of several classes.

    Args:
        logits: (batch, queries, classes), one for each class.
        boxes: (batch, queries, 4), centre and size as shares of the image.
        target_sizes: (height, width) of each image; None for boxes as shares of the image.
        threshold: detections with a score up to this are dropped.
        top_k: how many to keep of an image, at most.

    Returns:
        For each image `scores`, float32 (detections,), highest first; `labels`, int64 (detections,); and `boxes`,
        float32 (detections, 4), left, top, right and bottom, clipped to the image.
    """
    classes = logits.shape[-1]
    all_scores, indices = logits.float().sigmoid().flatten(1).topk(min(top_k, logits[0].numel()), dim=1)
    queries = (indices // classes)[..., None].expand(-1, -1, 4)
    all_corners = to_corners(boxes.float()).gather(1, queries).clamp(0, 1)
    if target_sizes is not None:
        scales = torch.tensor([(width, height) * 2 for height, width in target_sizes], device=boxes.device)
        all_corners = all_corners * scales[:, None]
    return [
        {"scores": scores[scores > threshold], "labels": labels[scores > threshold], "boxes": box[scores > threshold]}
        for scores, labels, box in zip(all_scores, indices % classes, all_corners, strict=True)
    ]
