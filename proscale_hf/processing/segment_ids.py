"""Segments as COCO stores them: a map of ids is a picture whose colours are the ids in base 256; crowds have a flag."""

from typing import Any

import numpy as np

from proscale_hf.files.text import shown


VOID_ID = 0  # pixels of no segment


def encode_ids(segment_map: np.ndarray) -> np.ndarray:
    """The picture of a map of ids.

    Args:
        segment_map: `(height, width)` whole numbers from 0 to 256^3 - 1.

    Returns:
        `(height, width, 3)` uint8: red + 256 green + 256^2 blue is the id.
    """
    return segment_map.astype("<u4")[..., None].view(np.uint8)[..., :3]


def crowd_flag(value: Any) -> int:
    """What "iscrowd" of a segment says: 1 for a crowd, 0 for none.

    Args:
        value: 0 or 1, as a number, a text, or false or true. Some tools write texts.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, int | float | str | np.bool_ | np.integer) or value not in (0, 1, "0", "1"):
        raise ValueError(f'"iscrowd" must be 0 or 1, got {shown(value)}')
    return int(value)
