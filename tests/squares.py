"""Pictures of coloured squares with their segments, and a tiny model for them."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from helpers import tiny_model
from proscale_hf import ProScaleMask2FormerForUniversalSegmentation
from proscale_hf.data.sample import Sample


CATEGORIES = [
    {"id": 7, "name": "red", "isthing": 1, "color": [255, 0, 0]},
    {"id": 3, "name": "green", "isthing": 1, "color": [0, 255, 0]},
    {"id": 9, "name": "blue", "isthing": 1, "color": [0, 0, 255]},
    {"id": 1, "name": "ground", "isthing": 0, "color": [9, 9, 9]},
]
SIZES = [(64, 80), (50, 64), (64, 64), (40, 90), (64, 72)]


class Squares(torch.utils.data.Dataset):
    """Pictures with coloured squares (things) on dark ground (stuff), with a void stripe at the left."""

    categories = CATEGORIES
    source = SimpleNamespace(tasks=("panoptic", "instance", "semantic"))
    on_error = "raise"

    def __init__(self, images: int = len(SIZES), skipped: Sequence[str] = ()):
        self.images = images
        self.skipped = list(skipped)

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> Sample:
        random = np.random.default_rng(index)
        height, width = SIZES[index % len(SIZES)]
        image = random.integers(0, 50, (height, width, 3), dtype=np.uint8)
        segment_map = np.full((height, width), 1, dtype=np.int32)
        segments = [{"id": 1, "label_id": 3, "iscrowd": 0}]
        for label in range(1 + index % 3):
            top, left = random.integers(0, height - 16), 4 + 24 * label
            image[top : top + 16, left : left + 16, label] = 200
            segment_map[top : top + 16, left : left + 16] = label + 2
            segments.append({"id": label + 2, "label_id": label, "iscrowd": 0})
        segment_map[:, :2] = 0
        return Sample(Image.fromarray(image), index, f"{index}.png", segments, segment_map)

    read = __getitem__


def model_of_squares(seed: int = 0, **changes: Any) -> ProScaleMask2FormerForUniversalSegmentation:
    """A model that sees ground everywhere, so that untrained it has some quality."""
    names = {label: category["name"] for label, category in enumerate(CATEGORIES)}
    model = tiny_model(seed, id2label=names, categories=CATEGORIES, **changes)
    model.class_predictor.bias.data[3] += 3
    return model
