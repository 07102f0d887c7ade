"""The shapes of objects in COCO's instance JSON, polygons or run-length codes, checked and as run-length codes."""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from proscale_hf.data.sample import SampleError
from proscale_hf.files.text import one_line
from proscale_hf.processing.run_length import decompress_counts


def run_length_code(shape: list | dict[str, Any], size: tuple[int, int], name: str) -> tuple[dict[str, Any], int]:
    """COCO run-length code of an annotated shape, and its number of pixels.

    pycocotools trusts its input: where a code ends early, it decodes memory that was never written. So shapes are
    checked first.

    Args:
        shape: polygons `[[x, y, x, y, ...], ...]`, or a code whose "counts" are a list or compressed text.
        size: (height, width) of the image.
        name: of the object, for messages.

    Raises:
        SampleError: the shape is damaged, or leads far out of the image.
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
    lengths = counts if isinstance(counts, list) else decompress_counts(counts)
    if min(lengths, default=0) < 0 or sum(lengths) != height * width:
        raise ValueError(f"run lengths do not add up to {height} x {width}")
    if isinstance(counts, list):
        return coco_mask.frPyObjects(shape, height, width)
    return {"size": [height, width], "counts": counts.encode()}
