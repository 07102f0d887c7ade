"""Sizes of images: resized, padded, and of the batch they are in. A size is (height, width), in pixels."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.image_utils import SizeDict


Size = tuple[int, int]  # height, width
ResizeRule = Callable[[Size, SizeDict], Size]


@dataclass(frozen=True)
class ImageSizes:
    """
    What preprocessing makes of one image's size.

    Args:
        original: of the upright image, as it was given.
        resized: of the image in the batch, without padding.
        padded: of the batch; all its images have the same.
    """

    original: Size
    resized: Size
    padded: Size


def sizes_in_batch(
    originals: Iterable[Size],
    size: SizeDict | None,
    pad_size: SizeDict | None,
    divisor: int,
    resize_rule: ResizeRule | None = None,
) -> list[ImageSizes]:
    """
    Sizes of images that become one batch.

    Args:
        originals: of the images.
        size: what they are resized to, see [`resized_size`]; `None`: they stay as they are.
        pad_size: size of the batch; `None`: the largest of the images, rounded up to multiples of `divisor`.
        divisor: see `pad_size`; at least 1.
        resize_rule: [`resized_size`], or another with its arguments.

    Raises:
        `ValueError`: `size` is incomplete, or an image does not fit into `pad_size`.
    """
    originals = [(height, width) for height, width in originals]
    resized = originals if size is None else [(resize_rule or resized_size)(original, size) for original in originals]
    padded = padded_size(resized, pad_size, divisor)
    return [ImageSizes(original, new, padded) for original, new in zip(originals, resized, strict=True)]


def resized_size(image_size: Size, size: SizeDict) -> Size:
    """
    The resize rule: the aspect ratio stays unless `size` gives height and width, and no side vanishes.

    Args:
        image_size: (height, width).
        size: `height` and `width`, or `shortest_edge` and/or `longest_edge`, or `max_height` and `max_width`.

    Raises:
        `ValueError`: `size` has none of these.
    """
    if size.height and size.width:
        return size.height, size.width
    height, width = image_size
    if size.shortest_edge:
        height, width = _scaled(height, width, size.shortest_edge / min(height, width))
        if size.longest_edge and max(height, width) > size.longest_edge:
            height, width = _scaled(height, width, size.longest_edge / max(height, width))
    elif size.longest_edge:
        height, width = _scaled(height, width, size.longest_edge / max(height, width))
    elif size.max_height and size.max_width:
        height, width = _scaled(height, width, min(size.max_height / height, size.max_width / width))
    else:
        raise ValueError(f"`size` needs shortest_edge, longest_edge, height + width or max_height + max_width: {size}")
    return max(1, int(height + 0.5)), max(1, int(width + 0.5))


def resized_size_in_detr(image_size: Size, size: SizeDict) -> Size:
    """
    DETR's resize rule: as [`resized_size`], but the longer side follows from the rounded shorter one, and is cut off.

    Args:
        image_size: (height, width).
        size: as there.

    Raises:
        `ValueError`: as there.
    """
    if not size.shortest_edge or (size.height and size.width):
        return resized_size(image_size, size)
    shorter, longer = sorted(image_size)
    target = size.shortest_edge
    if size.longest_edge and longer / shorter * target > size.longest_edge:
        target = max(1, round(size.longest_edge * shorter / longer))
    height, width = (target if side == shorter else int(target * side / shorter) for side in image_size)
    return height, width


def padded_size(sizes: list[Size], pad_size: SizeDict | None, divisor: int) -> Size:
    """The size of a batch of images, see [`sizes_in_batch`]."""
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    if pad_size is None:
        return -(-height // divisor) * divisor, -(-width // divisor) * divisor
    if height > pad_size.height or width > pad_size.width:
        raise ValueError(
            f"`pad_size` {pad_size.height} x {pad_size.width} is too small: "
            f"after resizing, images have up to {height} x {width} pixels"
        )
    return pad_size.height, pad_size.width


def pixel_mask(sizes: list[ImageSizes]) -> np.ndarray:
    """Where the images of a batch are: int64 (batch, height, width), 1 for the image and 0 for padding."""
    masks = np.zeros((len(sizes), *sizes[0].padded), dtype=np.int64)
    for mask, size in zip(masks, sizes, strict=True):
        height, width = size.resized
        mask[:height, :width] = 1
    return masks


def as_sizes(sizes: Any) -> list[Size]:
    """(height, width) pairs of any kind, also a (batch, 2) array or tensor, as pairs of `int`."""
    pairs = sizes.tolist() if hasattr(sizes, "tolist") else sizes
    return [(int(height), int(width)) for height, width in pairs]


def _scaled(height: float, width: float, scale: float) -> tuple[float, float]:
    return height * scale, width * scale
