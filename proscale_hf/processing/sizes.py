"""Sizes of images, resized and padded."""

from transformers.image_utils import SizeDict


Size = tuple[int, int]  # height, width


def resized_size(image_size: Size, size: SizeDict) -> Size:
    """
    The resize rule: the aspect ratio stays unless `size` gives height and width, and no side vanishes.

    Args:
        image_size: (height, width).
        size: `height` and `width`, or `shortest_edge` and/or `longest_edge`, or `max_height` and `max_width`.

    Raises:
        `ValueError`: for another `size`.
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


def _scaled(height: float, width: float, scale: float) -> tuple[float, float]:
    return height * scale, width * scale


def _padded_size(sizes: list[Size], pad_size: SizeDict | None, divisor: int) -> Size:
    largest = tuple(max(size[axis] for size in sizes) for axis in (0, 1))
    if pad_size is None:
        return tuple(-(-length // divisor) * divisor for length in largest)
    if largest[0] > pad_size.height or largest[1] > pad_size.width:
        raise ValueError(
            f"`pad_size` {pad_size.height} x {pad_size.width} is too small: "
            f"after resizing, images have up to {largest[0]} x {largest[1]} pixels"
        )
    return pad_size.height, pad_size.width
