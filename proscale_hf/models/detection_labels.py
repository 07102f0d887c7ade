"""Labels of detection: what a model may be given, and what it refuses."""

from collections.abc import Sequence
from typing import Any

import torch


TOLERANCE = 1e-3  # by which rounding may carry a number beyond 0 or 1


def checked_detection_labels(
    labels: Sequence[dict[str, Any]], batch: int, num_labels: int, device: torch.device
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    Check labels before anything is computed: an index out of range would stop a GPU for good.

    Args:
        labels: per image a mapping with `class_labels`, (objects,) integers, and `boxes`, (objects, 4), x and y of the
            centre, width and height, as shares of the image without padding.
        batch: number of images.
        num_labels: classes of the model.
        device: where the labels are needed.

    Returns:
        Classes and boxes of each image, int64 and float32.

    Raises:
        ValueError: one line that names the image, and the box or the class.
    """
    if len(labels) != batch:
        raise ValueError(f"`labels` must have one entry per image: got {len(labels)} for {batch} images.")
    classes, boxes = [], []
    for i, image_labels in enumerate(labels):
        if "class_labels" not in image_labels or "boxes" not in image_labels:
            raise ValueError(f"Image {i}: `labels` must have `class_labels` and `boxes`, got {sorted(image_labels)}.")
        image_classes, image_boxes = image_labels["class_labels"], image_labels["boxes"]
        if image_classes.ndim != 1 or image_classes.is_floating_point() or image_classes.dtype == torch.bool:
            raise ValueError(
                f"Image {i}: `class_labels` must be integers of shape (objects,), got {image_classes.dtype} of shape "
                f"{tuple(image_classes.shape)}."
            )
        if image_boxes.shape != (len(image_classes), 4):
            raise ValueError(
                f"Image {i}: `boxes` must be ({len(image_classes)}, 4), one for each of `class_labels`, got "
                f"{tuple(image_boxes.shape)}."
            )
        classes.append(image_classes.to(device, torch.int64))
        boxes.append(image_boxes.to(device, torch.float32))
    if not torch.compiler.is_compiling():
        _check_values(torch.cat(classes), torch.cat(boxes), [len(image) for image in classes], num_labels)
    return classes, boxes


def _check_values(classes: torch.Tensor, boxes: torch.Tensor, counts: list[int], num_labels: int) -> None:
    values = torch.cat((boxes, classes[:, None].float()), dim=1).cpu()  # one transfer for all
    boxes, classes = values[:, :4], values[:, 4]
    is_box = (boxes >= -TOLERANCE).all(1) & (boxes <= 1 + TOLERANCE).all(1) & (boxes[:, 2:] >= 0).all(1)
    is_class = (classes >= 0) & (classes < num_labels)
    wrong = (~(is_box & is_class)).nonzero().flatten().tolist()
    if not wrong:
        return
    image, box = 0, wrong[0]
    while box >= counts[image]:
        box -= counts[image]
        image += 1
    if not is_class[wrong[0]]:
        raise ValueError(
            f"Image {image}, box {box}: `class_labels` holds {int(classes[wrong[0]])}, but this model has classes 0 to "
            f"{num_labels - 1}; check `num_labels` or `id2label` of its configuration."
        )
    numbers = ", ".join(f"{number:g}" for number in boxes[wrong[0]].tolist())
    raise ValueError(
        f"Image {image}, box {box}: `boxes` holds ({numbers}), but a box is the x and y of its centre, its width and "
        "its height, as shares of the image between 0 and 1."
    )
