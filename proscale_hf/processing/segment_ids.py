"""Ids of segments as COCO-panoptic stores them: a map of ids is a picture whose colours are the ids in base 256."""

import numpy as np


VOID_ID = 0  # pixels of no segment


def encode_ids(segment_map: np.ndarray) -> np.ndarray:
    """The picture of a map of ids.

    Args:
        segment_map: `(height, width)` whole numbers from 0 to 256^3 - 1.

    Returns:
        `(height, width, 3)` uint8: red + 256 green + 256^2 blue is the id.
    """
    return segment_map.astype("<u4")[..., None].view(np.uint8)[..., :3]
