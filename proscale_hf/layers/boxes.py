"""Boxes as models predict them: (x and y of the centre, width, height), as shares of the image, and their logits."""

import torch


EPSILON = 1e-3  # numbers are kept so far from 0 and 1 when their logit is taken, as in the original DINO


def to_corners(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) centre and size -> (left, top, right, bottom)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def to_centre_and_size(corners: torch.Tensor) -> torch.Tensor:
    """The inverse of [`to_corners`]."""
    first, second = corners[..., :2], corners[..., 2:]
    return torch.cat(((first + second) / 2, second - first), dim=-1)


def box_logits(boxes: torch.Tensor) -> torch.Tensor:
    """The inverse of the sigmoid, finite for every number: what is nearly 0 or 1 is `EPSILON` or 1 - `EPSILON`."""
    boxes = boxes.clamp(0, 1)
    return (boxes.clamp(min=EPSILON) / (1 - boxes).clamp(min=EPSILON)).log()


def refined(boxes: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
    """
    Boxes, changed by what a head says.

    Args:
        boxes: (..., 4) float32.
        changes: (..., 4) of any type, for the logits of the boxes.

    Returns:
        (..., 4) float32.
    """
    return (changes.to(boxes.dtype) + box_logits(boxes)).sigmoid()
