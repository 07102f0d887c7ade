"""COCO's run-length codes of masks: the lengths of alternating runs, down the columns, zeros first.

A code is `{"size": [height, width], "counts": ...}`. Counts are a list of lengths, or the compressed text that
pycocotools makes of them, as JSON files hold it.
"""

from typing import Any

import numpy as np


try:
    from pycocotools import mask as coco_mask
except ImportError:  # without it codes are not compressed
    coco_mask = None


MOST_GROUPS = 7  # of five bits in a number: more than any number of pixels needs


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """The code of a mask, compressed if pycocotools is installed.

    Args:
        mask: `(height, width)` bool, or 0 and 1.

    Returns:
        `{"size": [height, width], "counts": text}`; without pycocotools the counts are a list of whole numbers.
    """
    columns_first = np.asfortranarray(mask, dtype=np.uint8)
    if coco_mask is None:
        counts = run_lengths(columns_first)
    else:
        counts = coco_mask.encode(columns_first)["counts"].decode("ascii")
    return {"size": list(mask.shape), "counts": counts}


def run_lengths(mask: np.ndarray) -> list[int]:
    """The lengths of a mask's runs.

    Args:
        mask: `(height, width)` uint8, 0 and 1.

    Returns:
        Lengths that sum to height x width; the first is 0 where the mask begins with a 1.
    """
    values = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(values, prepend=0))
    return np.diff(changes, prepend=0, append=values.size).tolist()


def decompress_counts(counts: str) -> list[int]:
    """The lengths of runs that a compressed text stands for.

    Each number is written in groups of five bits, lowest first. From the fourth on, it is the difference to the length
    before the last.

    Raises:
        ValueError: the text is no such code, or has a number of more than 35 bits.
    """
    lengths: list[int] = []
    value = shift = 0
    for byte in counts.encode():
        bits = byte - 48
        if not 0 <= bits < 64:
            raise ValueError("a compressed run-length code has characters that do not belong there")
        value |= (bits & 31) << shift
        shift += 5
        if shift > 5 * MOST_GROUPS:
            raise ValueError("a compressed run-length code has a number that is larger than any image")
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("a compressed run-length code breaks off")
    return lengths
