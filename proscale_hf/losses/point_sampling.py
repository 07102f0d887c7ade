"""Masks and labels at points: bilinear values at (x, y) in the unit square, pixel centres at half-integers."""

import torch
from torch import nn

from proscale_hf.layers.linear import linear


CPU_PART_VALUES = 2**20  # float32 values of masks' points that are worked on at once
CPU_GROUPS = 8  # in which masks are sampled at once


def row_parts(rows: torch.Tensor, values_per_row: int) -> tuple[torch.Tensor, ...]:
    """Cut a tensor along its first axis, so that on the CPU what is made from a part stays in the cache."""
    on_cpu = rows.device.type == "cpu"
    return rows.split(max(1, CPU_PART_VALUES // values_per_row // CPU_GROUPS) * CPU_GROUPS) if on_cpu else (rows,)


def mask_products(embeddings: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """(masks, channels) and the per-pixel embedding (channels, height, width) -> (masks, height, width) float32."""
    return linear(embeddings, features.flatten(1).T).float().unflatten(1, features.shape[1:])


def sample_maps(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Bilinear values of (n, channels, height, width) maps at (n, points, 2) points -> (n, channels, points)."""
    return nn.functional.grid_sample(maps, as_grid(points), align_corners=False).squeeze(3)


def sample_maps_backward(gradient: torch.Tensor, maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The gradient for the maps of [`sample_maps`], given that of its result; of the maps only the shape matters."""
    backward = torch.ops.aten.grid_sampler_2d_backward
    return backward(gradient.unsqueeze(3), maps, as_grid(points), 0, 0, False, [True, False])[0]


def as_grid(points: torch.Tensor) -> torch.Tensor:
    """(n, points, 2) in the unit square -> (n, points, 1, 2) in `grid_sample`'s."""
    return 2 * points.unsqueeze(2) - 1


def sample_shared(masks: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Bilinear values of (n, height, width) masks, all at the same (points, 2) points -> (n, points).

    On the CPU, PyTorch samples in as many threads as there are items in the batch.
    """
    is_divisible = masks.device.type == "cpu" and len(masks) % CPU_GROUPS == 0
    groups = CPU_GROUPS if is_divisible else 1
    return sample_maps(masks.unflatten(0, (groups, -1)), points.expand(groups, -1, -1)).flatten(0, 1)


def sample_labels(planes: torch.Tensor, objects: int, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear values of packed masks at points, of which only the pixels around the points are unpacked.

    Args:
        planes: (planes, height, width) uint8, see `packed_masks.py`.
        objects: how many objects they hold.
        points: (points, 2), (x, y) in the unit square.

    Returns:
        (objects, points) float32, the values where no void pixel takes part, else 0; and (points,) float32, 1 there,
        else 0.
    """
    height, width = planes.shape[-2:]
    x, y = (points * points.new_tensor([width, height]) - 0.5).unbind(-1)
    left, top = x.floor(), y.floor()
    right_share, lower_share = x - left, y - top
    index = torch.arange(1, objects + 1, device=planes.device)
    plane, bit = index // 8, (index % 8).to(torch.uint8).unsqueeze(1)
    values = torch.zeros((objects, len(points)), device=planes.device)
    counted = torch.ones(len(points), device=planes.device)
    for row, row_weight in ((top, 1 - lower_share), (top + 1, lower_share)):
        for column, column_weight in ((left, 1 - right_share), (left + 1, right_share)):
            is_inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = row_weight * column_weight * is_inside  # what lies outside of the map has none
            pixel = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            corner = planes.flatten(1)[:, pixel]  # (planes, points)
            values += (corner[plane] >> bit & 1) * weight
            counted *= (corner[0] & 1 == 0) | (weight == 0)
    return values.mul_(counted), counted
