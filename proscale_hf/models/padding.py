"""What models know of the padding in a batch: found out once per call, before anything is computed."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import nn


T = TypeVar("T")


class ImageBatch(NamedTuple):
    """
    Attributes:
        pixel_values: (batch, channels, height, width), as they came, or padded to a multiple of the stride.
        padded_sizes: (batch, 2) int64, height and width of `pixel_values`, once for each image.
        image_sizes: (batch, 2) int64, height and width of each image without padding; None if nobody says it.
        sizes_alone: (batch, 2) int64, what each image would be padded to if it were alone; None where padding counts
            as image.
    """

    pixel_values: torch.Tensor
    padded_sizes: torch.Tensor
    image_sizes: torch.Tensor | None
    sizes_alone: torch.Tensor | None


def prepare_images(
    pixel_values: torch.Tensor,
    pixel_mask: torch.Tensor | None,
    image_sizes: torch.Tensor | None,
    stride: int,
    is_image_alone: bool,
) -> ImageBatch:
    """
    Check a batch of images, and find out what in it is padding.

    Args:
        pixel_values: (batch, channels, height, width).
        pixel_mask: (batch, height, width), 1 = image, 0 = padding at the bottom and right.
        image_sizes: (batch, 2), height and width of each image in the batch; read if there is no mask.
        stride: of the coarsest map.
        is_image_alone: if their sizes are known, images are to be treated as if each were alone, padded to the stride;
            the batch is padded to the stride too then.

    Raises:
        ValueError: an empty batch, or sizes that do not agree.
    """
    check_pixels(pixel_values, pixel_mask, image_sizes)
    if pixel_mask is not None:
        image_sizes = true_image_sizes(pixel_mask)
    elif image_sizes is not None:
        image_sizes = image_sizes.to(pixel_values.device, torch.int64)
    sizes_alone = None
    if image_sizes is not None and is_image_alone:
        pixel_values = pad_to_stride(pixel_values, stride)
        sizes_alone = -(-image_sizes // stride) * stride
    padded_size = torch.tensor(pixel_values.shape[-2:], device=pixel_values.device)
    return ImageBatch(pixel_values, padded_size.repeat(len(pixel_values), 1), image_sizes, sizes_alone)


def pad_to_stride(maps: torch.Tensor, stride: int) -> torch.Tensor:
    """Pad (..., height, width) with 0 at the bottom and right to multiples of the stride."""
    height, width = maps.shape[-2:]
    return nn.functional.pad(maps, (0, -width % stride, 0, -height % stride))


def run_by_size(
    run: Callable[[torch.Tensor], T], pixel_values: torch.Tensor, sizes: list[tuple[int, int]]
) -> tuple[list[T], torch.Tensor]:
    """
    Run each image of a batch at a size of its own, those of one size together.

    Args:
        run: takes (images, channels, height, width).
        pixel_values: (batch, channels, height, width).
        sizes: (height, width) of each image, whose upper left corner is that of `pixel_values`.

    Returns:
        What `run` gave for each size, and (batch,) int64, where each image is once those are put in a row.
    """
    order, outputs = [], []
    for height, width in sorted(set(sizes)):
        members = [i for i, size in enumerate(sizes) if size == (height, width)]
        order.extend(members)
        outputs.append(run(pixel_values[members, :, :height, :width]))
    return outputs, torch.tensor(order, device=pixel_values.device).argsort()


def pad_map(feature_map: torch.Tensor, size: tuple[int, int], mode: str = "constant") -> torch.Tensor:
    """Pad a (batch, channels, height, width) map at the bottom and right to `size`."""
    height, width = feature_map.shape[-2:]
    return nn.functional.pad(feature_map, (0, size[1] - width, 0, size[0] - height), mode=mode)


def true_image_sizes(pixel_mask: torch.Tensor) -> torch.Tensor:
    """(batch, height, width) mask, 1 = image -> (batch, 2) int64 height and width of each image, at least 1."""
    real = pixel_mask != 0
    return torch.stack((real.any(2).sum(1), real.any(1).sum(1)), dim=1).clamp(min=1)


def mask_of_sizes(image_sizes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The opposite of [`true_image_sizes`]: (batch, height, width) bool, True where the images are."""
    rows = torch.arange(height, device=image_sizes.device) < image_sizes[:, :1]
    columns = torch.arange(width, device=image_sizes.device) < image_sizes[:, 1:]
    return rows[:, :, None] & columns[:, None]


def check_pixels(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None, image_sizes: torch.Tensor | None) -> None:
    """Refuse inputs that cannot be an image batch.

    Raises:
        ValueError: one line that says which sizes there are, and which are right.
    """
    if pixel_values.ndim != 4 or 0 in pixel_values.shape:
        raise ValueError(
            f"`pixel_values` must be (batch, channels, height, width) and not empty, got {tuple(pixel_values.shape)}."
        )
    if pixel_mask is not None and pixel_mask.shape != (pixel_values.shape[0], *pixel_values.shape[-2:]):
        raise ValueError(
            f"`pixel_mask` must be (batch, height, width) of `pixel_values` {tuple(pixel_values.shape)}, "
            f"got {tuple(pixel_mask.shape)}."
        )
    if image_sizes is not None and image_sizes.shape != (len(pixel_values), 2):
        raise ValueError(
            f"`image_sizes` must be (batch, 2), a height and a width for each of {len(pixel_values)} images, "
            f"got {tuple(image_sizes.shape)}."
        )
    if pixel_mask is None and image_sizes is not None and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        limit = torch.tensor(pixel_values.shape[-2:], device=image_sizes.device)
        if not ((image_sizes >= 1) & (image_sizes <= limit)).all():
            raise ValueError(
                f"`image_sizes` must lie between 1 x 1 and the batch's {limit[0]} x {limit[1]}, "
                f"got {image_sizes.tolist()}."
            )
