"""Make a stand-in for your own data: pictures of shapes with polygons, in COCO's instance format.

    python examples/demo_shapes.py --output data

writes `train/*.png`, `train.json`, `val/*.png` and `val.json`. A picture depends only on its split and number.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from proscale_hf.endings import end_well


if __name__ == "__main__":
    end_well()  # before the imports that take seconds

import numpy as np
from PIL import Image, ImageDraw

from proscale_hf.files.folders import folder_written_whole


CORNERS = {"triangle": 3, "square": 4, "disc": 24}
SPLITS = ("train", "val")
SIZE = (160, 128)  # width, height
RADIUS_RANGE = (14, 28)  # pixels
MAX_SHAPES = 4


def draw_picture(random: np.random.Generator) -> tuple[Image.Image, list[tuple[str, list[float]]]]:
    """A picture, and the name and polygon (x, y, x, y, ...) of each shape. Later ones may cover others in part."""
    width, height = SIZE
    grain = random.integers(0, 60, (height, width, 3)) + random.integers(60, 140, 3)
    image = Image.fromarray(grain.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    shapes = []
    for name in random.choice(list(CORNERS), random.integers(1, MAX_SHAPES + 1)):
        radius, turn = random.uniform(*RADIUS_RANGE), random.uniform(0, 2 * math.pi)
        center_x, center_y = random.uniform(radius, width - radius), random.uniform(radius, height - radius)
        angles = turn + 2 * math.pi * np.arange(CORNERS[name]) / CORNERS[name]
        corners = np.stack((center_x + radius * np.cos(angles), center_y + radius * np.sin(angles)), axis=1)
        draw.polygon([tuple(corner) for corner in corners], fill=tuple(map(int, random.integers(0, 256, 3))))
        shapes.append((str(name), corners.round(2).flatten().tolist()))
    return image, shapes


def write_split(folder: Path, split: str, number: int) -> None:
    """Write `number` pictures and their JSON file."""
    images, annotations = [], []
    (folder / split).mkdir()
    for image_id in range(number):
        image, shapes = draw_picture(np.random.default_rng((SPLITS.index(split), image_id)))
        file_name = f"{image_id:04d}.png"
        image.save(folder / split / file_name)
        images.append({"id": image_id, "file_name": file_name, "width": image.width, "height": image.height})
        for name, polygon in shapes:
            x, y = np.array(polygon[0::2]), np.array(polygon[1::2])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": list(CORNERS).index(name) + 1,
                    "segmentation": [polygon],
                    "area": float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2),
                    "bbox": [float(x.min()), float(y.min()), float(np.ptp(x)), float(np.ptp(y))],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": category_id, "name": name} for category_id, name in enumerate(CORNERS, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{split}.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--number", type=int, default=200, help="pictures to train on; a tenth more to validate on")
    arguments = parser.parse_args()
    try:
        with folder_written_whole(arguments.output) as unfinished:
            write_split(unfinished, "train", arguments.number)
            write_split(unfinished, "val", max(1, arguments.number // 10))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
