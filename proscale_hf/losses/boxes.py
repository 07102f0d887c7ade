"""How far boxes are from each other."""

import torch
from torch import nn

from proscale_hf.layers.boxes import to_corners


EPSILON = 1e-6  # in front of areas that are divided by, as in the original DINO


def generalized_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    Generalised intersection over union (https://arxiv.org/abs/1902.09630), 1 for equal boxes, else down to -1.

    Args:
        first: (..., 4) left, top, right, bottom.
        second: the same, of a shape that can be broadcast.

    Returns:
        (...).
    """
    starts, ends = (first[..., :2], second[..., :2]), (first[..., 2:], second[..., 2:])
    intersection = area(torch.maximum(*starts), torch.minimum(*ends))
    enclosing = area(torch.minimum(*starts), torch.maximum(*ends))
    union = area(starts[0], ends[0]) + area(starts[1], ends[1]) - intersection
    return intersection / (union + EPSILON) - (enclosing - union) / (enclosing + EPSILON)


def area(upper_left: torch.Tensor, lower_right: torch.Tensor) -> torch.Tensor:
    """(..., 2) and (..., 2), x and y -> (...), 0 where the second corner is not beyond the first."""
    width, height = (lower_right - upper_left).clamp(min=0).unbind(-1)
    return width * height


def matched_box_losses(boxes: torch.Tensor, objects: torch.Tensor) -> torch.Tensor:
    """
    Losses of boxes that are matched to objects.

    Args:
        boxes: (matches, 4), centre and size.
        objects: (matches, 4), the object of each.

    Returns:
        (2, matches): the sum of the differences of the four numbers, and 1 - the generalised intersection over union.
    """
    difference = nn.functional.l1_loss(boxes, objects, reduction="none").sum(-1)
    return torch.stack((difference, 1 - generalized_iou(to_corners(boxes), to_corners(objects))))
