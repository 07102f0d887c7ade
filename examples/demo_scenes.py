"""Make demo scenes: handwritten digits on photographed ground, from pictures inside scikit-image and scikit-learn.

The ground of a scene has one to three kinds of *stuff*: tinted photographs of brick, grass and gravel. On it lie one to
four *things*, handwritten digits, which may cover one another in part. Every pixel belongs to one segment, so a scene
is a panoptic ground truth. Nothing is downloaded. A scene depends only on (split, seed, index).

The two splits share no source pixel: training takes the first digits of scikit-learn's set and the left halves of the
photographs, held-out scenes take the last digits (by other writers) and the right halves.

    python examples/demo_scenes.py --output scenes --number 200 --split held-out --seed 0

writes `images/*.png`, `panoptic/*.png` and `panoptic.json` in the COCO-panoptic format.
"""

import argparse
import colorsys
import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from proscale_hf.endings import end_well


if __name__ == "__main__":
    end_well()  # before the imports that take seconds

import numpy as np
from PIL import Image

from proscale_hf.files.folders import folder_written_whole
from proscale_hf.processing.segment_ids import encode_ids


try:
    from skimage import data as photographs
    from sklearn.datasets import load_digits
except ImportError as error:
    sys.exit(f'error: {error.name} is not installed: pip install "proscale-hf[demo]"')


SPLITS = ("train", "held-out")
STUFF_NAMES = ("brick", "grass", "gravel")
ID2LABEL = dict(enumerate([*(f"digit {digit}" for digit in range(10)), *STUFF_NAMES]))
THING_LABEL_IDS = list(range(10))
STUFF_LABEL_IDS = [10, 11, 12]

HEIGHT_RANGE = (128, 192)
WIDTH_RANGE = (128, 160)
DIGIT_SIZE_RANGE = (48, 80)
MAX_DIGITS = 4
MAX_ROTATION_DEGREES = 15
TRAIN_DIGITS = 1347  # of 1797; they are ordered by writer, so the rest is by other writers
MIN_VISIBLE_FRACTION = 0.8
MIN_REGION_FRACTION = 0.1
# Hues are in turns. They overlap: colour alone does not tell grass from gravel.
HUE_RANGES = {"brick": (0.95, 1.15), "grass": (0.12, 0.42), "gravel": (0.05, 0.70)}
SATURATION_RANGES = {"brick": (0.2, 0.6), "grass": (0.2, 0.6), "gravel": (0.0, 0.25)}


@dataclass(frozen=True)
class Scene:
    """One picture and its panoptic ground truth.

    Attributes:
        image: RGB picture.
        segment_ids: `(height, width)` int32 map of segment ids, which start at 1.
        segments_info: per segment its `id`, `category_id` (a label id), `area`, `bbox` (x, y, width, height;
            pixels) and `iscrowd`, as in COCO-panoptic.
    """

    image: Image.Image
    segment_ids: np.ndarray
    segments_info: list[dict]

    @property
    def instance_id_to_semantic_id(self) -> dict[int, int]:
        return {segment["id"]: segment["category_id"] for segment in self.segments_info}


class DemoScenes:
    """Map-style dataset of `number` scenes; the same (split, seed, index) always gives the same scene.

    Args:
        number: how many scenes.
        split: `"train"` or `"held-out"`.
        seed: non-negative seed of the whole set.
        size: height and width of every scene, in pixels; drawn per scene if not given.
    """

    def __init__(self, number: int, split: str = "train", seed: int = 0, size: tuple[int, int] | None = None):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
        if number < 0 or seed < 0:
            raise ValueError(f"number and seed must not be negative, got {number} and {seed}.")
        self.number, self.split, self.seed, self.size = number, split, seed, size

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.number:
            raise IndexError(f"scene {index} of {self.number}")
        generator = np.random.default_rng([SPLITS.index(self.split), self.seed, index])
        height, width = self.size or (
            int(generator.integers(*limits, endpoint=True)) for limits in (HEIGHT_RANGE, WIDTH_RANGE)
        )
        return draw_scene(generator, self.split, height, width)


def draw_scene(generator: np.random.Generator, split: str, height: int, width: int) -> Scene:
    """Draw one scene from the split's digits and photographs."""
    picture, segment_ids, label_ids = draw_ground(generator, split, height, width)
    full_areas = {}
    for _ in range(generator.integers(1, MAX_DIGITS, endpoint=True)):
        label_id, coverage = draw_digit(generator, split)
        place = find_place(generator, coverage > 0.5, segment_ids, full_areas)
        if place is None:
            continue
        segment_id = len(label_ids) + 1
        label_ids.append(label_id)
        full_areas[segment_id] = int((coverage > 0.5).sum())
        segment_ids[place][coverage > 0.5] = segment_id
        paint_digit(generator, picture[place], coverage)
    image = Image.fromarray(np.clip(picture, 0, 255).round().astype(np.uint8))
    return Scene(image, segment_ids, describe_segments(segment_ids, label_ids))


def draw_ground(
    generator: np.random.Generator, split: str, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Paint one to three kinds of ground.

    Returns:
        The picture `(height, width, 3)` float32 in 0..255, segment ids `(height, width)` int32, and the label id
        of each segment.
    """
    label_ids = generator.permutation(STUFF_LABEL_IDS)[: generator.integers(1, 3, endpoint=True)].tolist()
    regions = split_regions(generator, len(label_ids), height, width)
    picture = np.empty((height, width, 3), dtype=np.float32)
    for region, label_id in enumerate(label_ids):
        ground = draw_texture(generator, split, ID2LABEL[label_id], height, width)
        picture[regions == region] = ground[regions == region]
    return picture, regions + 1, label_ids


def split_regions(generator: np.random.Generator, number: int, height: int, width: int) -> np.ndarray:
    """Divide the canvas between random points, with wavy borders: `(height, width)` int32 from 0."""
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    while True:
        rows_wavy = rows + 10 * smooth_noise(generator, height, width)
        columns_wavy = columns + 10 * smooth_noise(generator, height, width)
        points = generator.uniform((0, 0), (height, width), size=(number, 2))
        distances = [(rows_wavy - row) ** 2 + (columns_wavy - column) ** 2 for row, column in points]
        regions = np.argmin(distances, axis=0).astype(np.int32)
        if np.bincount(regions.ravel(), minlength=number).min() >= MIN_REGION_FRACTION * height * width:
            return regions


def smooth_noise(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Slowly varying normal noise, `(height, width)` float32."""
    coarse = Image.fromarray(generator.standard_normal((5, 5)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def draw_texture(generator: np.random.Generator, split: str, name: str, height: int, width: int) -> np.ndarray:
    """Crop, mirror, tint and light one photograph: `(height, width, 3)` float32, about 0..255."""
    photograph = load_photograph_half(name, split)
    zoom = generator.uniform(0.8, 1.4)
    crop_width, crop_height = width / zoom, height / zoom
    left = generator.uniform(0, photograph.width - crop_width)
    top = generator.uniform(0, photograph.height - crop_height)
    box = (left, top, left + crop_width, top + crop_height)
    gray = np.asarray(photograph.resize((width, height), Image.Resampling.BICUBIC, box=box))
    gray = gray[:, :: generator.choice([-1, 1]), None] / 255

    hue = generator.uniform(*HUE_RANGES[name]) % 1
    saturation = generator.uniform(*SATURATION_RANGES[name])
    bright = np.array(colorsys.hsv_to_rgb(hue, saturation, 1.0))
    dark = np.array(colorsys.hsv_to_rgb(hue, saturation, generator.uniform(0.0, 0.2)))
    slope_down, slope_right = generator.uniform(-0.2, 0.2, size=2)
    light = generator.uniform(0.85, 1.3)
    light = light + slope_down * np.linspace(-1, 1, height)[:, None] + slope_right * np.linspace(-1, 1, width)
    return (255 * light[..., None] * (dark + gray * (bright - dark))).astype(np.float32)


def draw_digit(generator: np.random.Generator, split: str) -> tuple[int, np.ndarray]:
    """Take a handwritten digit, enlarge and turn it.

    Returns:
        The label id (the digit) and its coverage, `(height, width)` float32 in 0..1, cropped to the digit.
    """
    pixels, digits = load_digit_split(split)
    index = generator.integers(len(digits))
    size = int(generator.integers(*DIGIT_SIZE_RANGE, endpoint=True))
    angle = generator.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES)
    framed = Image.fromarray(np.pad(pixels[index], 2))
    large = framed.resize((size * 3 // 2, size * 3 // 2), Image.Resampling.BICUBIC)
    ink = np.asarray(large.rotate(angle, Image.Resampling.BICUBIC))
    # A steep ramp around mid-gray turns the blurred enlargement into a pen stroke with a smooth edge.
    coverage = np.clip((ink - 0.5) * size / 12 + 0.5, 0, 1)
    rows, columns = np.nonzero(coverage > 0.5)
    coverage = coverage[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return int(digits[index]), coverage


def find_place(
    generator: np.random.Generator, mask: np.ndarray, segment_ids: np.ndarray, full_areas: dict[int, int]
) -> tuple[slice, slice] | None:
    """Find a place where the digit hides no earlier one too much; None if 20 random places all do.

    Args:
        mask: `(digit height, digit width)` bool.
        segment_ids: `(height, width)` int32, the scene so far.
        full_areas: by segment id, the number of pixels of each earlier digit when nothing covers it.
    """
    for _ in range(20):
        top = int(generator.integers(segment_ids.shape[0] - mask.shape[0], endpoint=True))
        left = int(generator.integers(segment_ids.shape[1] - mask.shape[1], endpoint=True))
        place = (slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1]))
        hidden = segment_ids[place][mask]
        if all(
            (segment_ids == segment_id).sum() - (hidden == segment_id).sum() >= MIN_VISIBLE_FRACTION * area
            for segment_id, area in full_areas.items()
        ):
            return place
    return None


def paint_digit(generator: np.random.Generator, picture: np.ndarray, coverage: np.ndarray) -> None:
    """Blend a digit into `picture` (`(height, width, 3)` float32, in place) in a colour that stands out."""
    covered = picture[coverage > 0.5].mean(axis=0)
    while True:
        hue, saturation, value = generator.uniform((0, 0.3, 0.1), (1, 1, 1))
        colour = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))
        if np.abs(colour - covered).mean() > 75:
            break
    picture += coverage[..., None] * (colour - picture)


def describe_segments(segment_ids: np.ndarray, label_ids: list[int]) -> list[dict]:
    """COCO-panoptic `segments_info` of the segments 1, 2, ... that are still visible."""
    segments_info = []
    for segment_id, label_id in enumerate(label_ids, start=1):
        rows, columns = np.nonzero(segment_ids == segment_id)
        if len(rows) == 0:
            continue
        left, top = int(columns.min()), int(rows.min())
        bbox = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
        segments_info.append({"id": segment_id, "category_id": label_id, "area": len(rows), "bbox": bbox, "iscrowd": 0})
    return segments_info


@cache
def load_digit_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The split's digits: `(number, 8, 8)` float32 ink in 0..1, and `(number,)` the digit that each shows."""
    digits = load_digits()
    part = slice(None, TRAIN_DIGITS) if split == "train" else slice(TRAIN_DIGITS, None)
    return (digits.images[part] / 16).astype(np.float32), digits.target[part]


@cache
def load_photograph_half(name: str, split: str) -> Image.Image:
    """The split's half of a photograph, 512 x 256: float gray, all with the same mean and contrast."""
    gray = getattr(photographs, name)().astype(np.float32)
    half = gray[:, :256] if split == "train" else gray[:, 256:]
    return Image.fromarray(np.clip(128 + 40 * (half - half.mean()) / half.std(), 0, 255))


def write_scenes(scenes: DemoScenes, output: Path) -> None:
    """Write the scenes as PNG and COCO-panoptic JSON; the folder appears only when it is complete.

    Raises:
        ValueError: `output` is there already and not empty, or cannot be made.
    """
    with folder_written_whole(output) as unfinished:
        write_coco_panoptic(scenes, unfinished)


def write_coco_panoptic(scenes: DemoScenes, folder: Path) -> None:
    images, annotations = [], []
    (folder / "images").mkdir()
    (folder / "panoptic").mkdir()
    for image_id, scene in enumerate(scenes):
        file_name = f"{image_id:06d}.png"
        scene.image.save(folder / "images" / file_name)
        Image.fromarray(encode_ids(scene.segment_ids)).save(folder / "panoptic" / file_name)
        size = {"height": scene.image.height, "width": scene.image.width}
        images.append({"id": image_id, "file_name": file_name, **size})
        annotations.append({"image_id": image_id, "file_name": file_name, "segments_info": scene.segments_info})
    categories = [
        {"id": label_id, "name": name, "isthing": int(label_id in THING_LABEL_IDS)}
        for label_id, name in ID2LABEL.items()
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "panoptic.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--number", type=int, default=200, help="how many scenes (default: 200)")
    parser.add_argument("--split", choices=SPLITS, default="held-out", help="default: held-out")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    arguments = parser.parse_args()
    try:
        write_scenes(DemoScenes(arguments.number, arguments.split, arguments.seed), arguments.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
