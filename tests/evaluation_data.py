"""Small COCO-panoptic sets, and outputs of a model that is right, for the tests of evaluation."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from proscale_hf import ProScaleMask2FormerImageProcessorPil
from proscale_hf.data.opening import open_dataset
from proscale_hf.processing.segment_ids import encode_ids


CATEGORIES = [
    {"id": 7, "name": "cat", "isthing": 1, "color": [250, 0, 0]},
    {"id": 3, "name": "dog", "isthing": 1, "color": [0, 250, 0]},
    {"id": 90, "name": "grass", "isthing": 0, "color": [0, 0, 250]},
    {"id": 12, "name": "sky", "isthing": 0, "color": [9, 9, 9]},
]
ID2LABEL = {label: category["name"] for label, category in enumerate(CATEGORIES)}
STUFF = [2, 3]
# Left, right, category id, iscrowd. Columns 64 to 72 are void.
STRIPES = [(0, 16, 7, 0), (16, 40, 7, 0), (40, 64, 90, 0), (72, 80, 3, 1), (80, 96, 3, 0)]


def write_set(folder: Path, images: int, seed: int = 0) -> Path:
    """Noise of different sizes, with a truth of vertical stripes: two cats, grass, void, a crowd of dogs, and a dog.

    There is no sky. Image ids are not in order.
    """
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "maps").mkdir()
    entries, annotations = [], []
    for number in range(images):
        image_id, height, name = 1000 - 7 * number, 32 + 8 * (number % 3), f"photo{number}"
        pixels = generator.integers(0, 256, (height, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        segment_map = np.zeros((height, 96), dtype=np.int32)
        segments = []
        for left, right, category_id, iscrowd in STRIPES:
            segment_id = 1000 * number + left + 1
            segment_map[:, left:right] = segment_id
            segments.append({"id": segment_id, "category_id": category_id, "iscrowd": iscrowd})
        Image.fromarray(encode_ids(segment_map)).save(folder / "maps" / f"{name}.png")
        entries.append({"id": image_id, "file_name": f"{name}.png", "height": height, "width": 96})
        annotations.append({"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments})
    content = {"images": entries, "annotations": annotations, "categories": CATEGORIES}
    (folder / "panoptic.json").write_text(json.dumps(content))
    return folder


def options_of(folder: Path) -> dict[str, str]:
    names = {"images": "images", "annotations": "panoptic.json", "segment_maps": "maps"}
    return {option: str(folder / name) for option, name in names.items()}


def open_set(folder: Path, **options: Any) -> Any:
    return open_dataset("coco_panoptic", **options_of(folder), **options)


def right_outputs(height: int, labels: tuple[int, ...] = (0, 0, 2, 1, 1)) -> dict[str, torch.Tensor]:
    """What a model gives that has found all `STRIPES` of one image, and calls them `labels`."""
    masks = torch.full((1, len(STRIPES), height // 4, 24), -20.0)
    classes = torch.zeros((1, len(STRIPES), len(CATEGORIES) + 1))
    for query, (left, right, _, _) in enumerate(STRIPES):
        masks[0, query, :, left // 4 : right // 4] = 20
        classes[0, query, labels[query]] = 20
    sizes = torch.tensor([[height, 96]])
    return {
        "class_queries_logits": classes,
        "masks_queries_logits": masks,
        "image_sizes": sizes,
        "padded_sizes": sizes,
    }


class NearlyRight(torch.nn.Module):
    """In place of a model: finds all `STRIPES`, and how it calls them depends on the image's first pixel.

    Its labels are in another order than the categories; images must come neither resized nor normalised.
    """

    names = ("sky", "dog", "cat", "grass")
    stuff = (0, 3)
    answers = (("cat", "cat", "grass", "dog", "dog"), ("cat", "dog", "grass", "dog", "dog"), ("dog", *["grass"] * 4))

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(id2label=dict(enumerate(self.names)), stuff_label_ids=lambda unsaid=None: unsaid)

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor, **_: object) -> dict[str, torch.Tensor]:
        outputs = []
        for image in pixel_values:
            answer = self.answers[int(255 * image[0, 0, 0]) % len(self.answers)]
            outputs.append(right_outputs(image.shape[1], tuple(self.names.index(name) for name in answer)))
        heights, widths = pixel_mask.any(2).sum(1), pixel_mask.any(1).sum(1)
        names = ("class_queries_logits", "masks_queries_logits", "padded_sizes")
        batch = {name: torch.cat([output[name] for output in outputs]) for name in names}
        return {**batch, "image_sizes": torch.stack((heights, widths), dim=1)}

    @staticmethod
    def processor() -> ProScaleMask2FormerImageProcessorPil:
        return ProScaleMask2FormerImageProcessorPil(
            do_resize=False, do_normalize=False, label_ids_to_fuse=list(NearlyRight.stuff)
        )


def instance_json(path: Path, folder: Path, images: int | None = None) -> Path:
    """The things of a set that `write_set` wrote, as COCO instance JSON with categories in another order."""
    content = json.loads((folder / "panoptic.json").read_text())
    annotations = [
        {
            "id": 10 * number + stripe,
            "image_id": image["id"],
            "category_id": category_id,
            "iscrowd": iscrowd,
            "area": (right - left) * image["height"],
            "bbox": [left, 0, right - left, image["height"]],
            "segmentation": rectangle(left, right, image["height"], iscrowd),
        }
        for number, image in enumerate(content["images"][:images], start=1)
        for stripe, (left, right, category_id, iscrowd) in enumerate(STRIPES)
        if category_id != 90
    ]
    things = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}]
    path.write_text(
        json.dumps({"images": content["images"][:images], "annotations": annotations, "categories": things})
    )
    return path


def rectangle(left: int, right: int, height: int, as_code: int) -> Any:
    """A stripe as COCO writes it: a polygon, or for a crowd the lengths of runs down the columns."""
    if not as_code:
        return [[left, 0, right, 0, right, height, left, height]]
    return {"size": [height, 96], "counts": [left * height, (right - left) * height, (96 - right) * height]}
