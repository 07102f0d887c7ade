"""The shapes of objects in COCO's instance JSON, polygons or run-length codes, checked and as run-length codes."""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from proscale_hf.data.sample import SampleError, check_size
from proscale_hf.data.sources.polygons import POLYGON_FORM
from proscale_hf.files.text import one_line
from proscale_hf.processing.run_length import decompress_counts


LONGEST_OUTLINE = 2**22  # pixels; pycocotools holds about 100 bytes for each


def run_length_code(shape: list | dict[str, Any], size: tuple[int, int], name: str) -> tuple[dict[str, Any], int]:
    """COCO run-length code of an annotated shape, and its number of pixels.

    pycocotools trusts its input: where a code ends early, it decodes memory that was never written, and an outline that
    is too long ends the process. So shapes are checked first, and only what was checked is handed on.

    Args:
        shape: polygons `[[x, y, x, y, ...], ...]`, or a code whose "counts" are a list or compressed text.
        size: (height, width) of the image as it was read.
        name: of the object, for messages.

    Raises:
        SampleError: the shape is damaged, leads far out of the image, or is of an image of another size.
    """
    try:
        if isinstance(shape, list):
            code = coco_mask.merge(coco_mask.frPyObjects([_checked_polygon(polygon, size) for polygon in shape], *size))
        else:
            code = _checked_code(shape, size, name)
        return code, int(coco_mask.area(code))
    except SampleError:
        raise
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise SampleError(f"{name}: its segmentation cannot be used ({one_line(error)}).") from error


def _checked_polygon(polygon: list[float], size: tuple[int, int]) -> list[float]:
    if not all(type(coordinate) in (int, float) for coordinate in polygon):
        raise ValueError(f"a polygon must be {POLYGON_FORM}, numbers alone")
    if len(polygon) % 2:
        raise ValueError("a polygon has an odd number of coordinates")
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)  # (points, x and y)
    lengths = np.array(size[::-1])
    if not ((points >= -lengths) & (points <= 2 * lengths)).all():
        raise ValueError(f"a polygon leads far out of the image of {size[0]} x {size[1]} (height x width)")
    if np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum() > LONGEST_OUTLINE:
        raise ValueError(f"the outline of a polygon is longer than {LONGEST_OUTLINE} pixels")
    return points.ravel().tolist()


def _checked_code(shape: dict[str, Any], size: tuple[int, int], name: str) -> dict[str, Any]:
    if missing := {"size", "counts"} - shape.keys():
        raise ValueError(f"a run-length code has no {' and no '.join(sorted(missing))}")
    if not _are_whole(shape["size"]) or len(shape["size"]) != 2:
        raise ValueError("the size of a run-length code must be [height, width], whole numbers")
    check_size(shape["size"], size, name)
    counts, (height, width) = shape["counts"], size
    if not isinstance(counts, str) and not _are_whole(counts):
        raise ValueError("the counts of a run-length code must be whole numbers, or a compressed text")
    lengths = decompress_counts(counts) if isinstance(counts, str) else counts
    if min(lengths, default=0) < 0 or sum(lengths) != height * width:
        raise ValueError(f"run lengths do not add up to {height} x {width}")
    if isinstance(counts, str):
        return {"size": [height, width], "counts": counts.encode()}
    return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def _are_whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)
