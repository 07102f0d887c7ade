"""COCO's run-length codes, of polygons or other codes that an annotation file holds."""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from proscale_hf.data.sample import SampleError
from proscale_hf.files.text import one_line


def run_length_code(shape: list | dict[str, Any], size: tuple[int, int], name: str) -> tuple[dict[str, Any], int]:
    """COCO run-length code of an annotated shape, and its number of pixels.

    pycocotools trusts what it gets (of a code that ends early it decodes memory that was never written), so all is
    checked first.

    Args:
        shape: polygons `[[x, y, x, y, ...], ...]`, or a code whose "counts" are a list or compressed text.
        size: (height, width) of the image.
        name: of the object, for messages.

    Raises:
        SampleError: the shape cannot be meant.
    """
    try:
        if isinstance(shape, list):
            for polygon in shape:
                _check_polygon(polygon, size)
            code = coco_mask.merge(coco_mask.frPyObjects(shape, *size))
        else:
            code = _checked_code(shape)
        return code, int(coco_mask.area(code))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise SampleError(f"{name}: its segmentation cannot be used ({one_line(error)}).") from error


def _check_polygon(polygon: list[float], size: tuple[int, int]) -> None:
    if len(polygon) % 2:
        raise ValueError("a polygon has an odd number of coordinates")
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)  # (points, x and y)
    lengths = np.array(size[::-1])
    if not ((points >= -lengths) & (points <= 2 * lengths)).all():
        raise ValueError(f"a polygon leads far out of the image of {size[0]} x {size[1]} (height x width)")


def _checked_code(shape: dict[str, Any]) -> dict[str, Any]:
    if missing := {"size", "counts"} - shape.keys():
        raise ValueError(f"a run-length code has no {' and no '.join(sorted(missing))}")
    height, width = (int(length) for length in shape["size"])
    counts = shape["counts"]
    lengths = counts if isinstance(counts, list) else run_lengths(counts)
    if min(lengths, default=0) < 0 or sum(lengths) != height * width:
        raise ValueError(f"run lengths do not add up to {height} x {width}")
    if isinstance(counts, list):
        return coco_mask.frPyObjects(shape, height, width)
    return {"size": [height, width], "counts": counts.encode()}


def run_lengths(counts: str) -> list[int]:
    """The runs of a compressed COCO code: groups of five bits, lowest first, each run as difference to the one before
    the last.

    Raises:
        ValueError: the text is not such a code.
    """
    lengths: list[int] = []
    value = shift = 0
    for byte in counts.encode():
        bits = byte - 48
        if not 0 <= bits < 64:
            raise ValueError("a compressed run-length code has characters that do not belong there")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("a compressed run-length code breaks off")
    return lengths
