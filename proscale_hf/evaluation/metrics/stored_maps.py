"""Maps and masks the way `evaluate` stores them: maps as PNG, masks as run-length codes with text."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from proscale_hf.processing.segment_ids import encode_ids


def as_array(segment_map: Any) -> np.ndarray:
    """A `(height, width)` map of whole numbers, from whatever holds one: array, tensor on any device, lists.

    Raises:
        ValueError: it is something else.
    """
    array = np.asarray(segment_map.cpu() if hasattr(segment_map, "cpu") else segment_map)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(f"a map must be (height, width) whole numbers, got {array.shape} of type {array.dtype}.")
    return array


def ids_as_png(segment_map: Any) -> bytes:
    """A map of segment ids as PNG in COCO-panoptic's colours.

    Raises:
        ValueError: it is no map, or has ids that COCO's colours cannot hold.
    """
    ids = as_array(segment_map)
    check_values(ids, 256**3)
    return encode_png(encode_ids(ids))


def labels_as_png(label_map: Any) -> bytes:
    """A map of labels as PNG with 8 bits, or 16 where they are needed.

    Raises:
        ValueError: it is no map, or has labels that do not fit.
    """
    labels = as_array(label_map)
    check_values(labels, 256**2)
    return encode_png(labels.astype(np.uint8 if labels.max(initial=0) < 256 else np.uint16))


def check_values(segment_map: np.ndarray, limit: int) -> None:
    lowest, highest = segment_map.min(initial=0), segment_map.max(initial=0)
    if lowest < 0 or highest >= limit:
        raise ValueError(f"a map must have values from 0 to {limit - 1}, but has {lowest} to {highest}.")


def encode_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def decode(png: bytes) -> np.ndarray:
    """Labels `(height, width)`, or colours `(height, width, 3)`."""
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture)


def with_text_counts(mask: Mapping[str, Any]) -> dict[str, Any]:
    """A compressed COCO run-length code whose counts are text, as in JSON files."""
    counts = mask["counts"]
    return {"size": list(mask["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
