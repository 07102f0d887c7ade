"""COCO's two formats: panoptic (JSON and a folder of PNG files) and instances (JSON with polygons or run-length codes).

They serve any data in these formats. `root` and `split` say where COCO itself keeps its files; `images`, `annotations`
and `segment_maps` name other places.
"""

import json
import mmap
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets.fingerprint import Hasher
from transformers.utils import logging

from proscale_hf.data.categories import load_categories, names_by_id
from proscale_hf.data.dataset import (
    SegmentationSource,
    cached_rows,
    choose_categories,
    complete_categories,
    file_states,
)
from proscale_hf.data.reading import path_inside, read_color_map, read_image, shown_segments
from proscale_hf.data.sample import Sample, check_size
from proscale_hf.data.sources.json_arrays import read_array
from proscale_hf.data.sources.polygons import polygons_of
from proscale_hf.files.text import printable, shown
from proscale_hf.processing.categories import check_categories
from proscale_hf.processing.segment_ids import crowd_flag


logger = logging.get_logger(__name__)

LARGEST_NUMBER = 2**53  # what every reader of JSON holds exactly


class CocoPanoptic(SegmentationSource):
    """COCO-panoptic data: a JSON file, a picture of segment ids for each image, and the images.

    Only images that have an entry under "annotations" belong to the data. Crowds and pixels of id 0 are void. Segments
    that have no pixel are left out.

    Args:
        root: folder with `annotations/panoptic_{split}.json`, `annotations/panoptic_{split}/` or `panoptic_{split}/`
            (pictures of ids), and `{split}/` (images).
        split: `train2017`, for example.
        images: folder of images, instead of the one in `root`.
        annotations: JSON file, instead of the one in `root`.
        segment_maps: folder of pictures of ids, instead of the one in `root`.
        categories: a name of `CATEGORY_SETS`, or a file that `read_categories` takes; they must not contradict those in
            the JSON. Default: those in the JSON, in its order; where they are COCO's own, COCO's with the things first.

    Raises:
        ValueError: files are not there, or the categories are not right; one line.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        split: str | None = None,
        *,
        images: str | Path | None = None,
        annotations: str | Path | None = None,
        segment_maps: str | Path | None = None,
        categories: str | Path | None = None,
    ):
        self.images = _locate("images", images, root, split, "{split}")
        self.annotations = _locate("annotations", annotations, root, split, "annotations/panoptic_{split}.json")
        self.segment_maps = _locate(
            "segment_maps", segment_maps, root, split, "panoptic_{split}", "annotations/panoptic_{split}"
        )
        self.categories = _coco_categories(self.annotations, categories, "coco_panoptic")

    def files(self) -> list[Path]:
        return [self.annotations]

    def rows(self) -> Iterator[dict[str, Any]]:
        image_names = _image_entries(self.annotations)
        labels = _Labels(self.annotations, self.categories)
        annotation = None
        for annotation, _, _ in read_array(self.annotations, "annotations"):
            image_id = _take(annotation, "image_id", (int, str), f"an annotation in {self.annotations}")
            if image_id not in image_names:
                raise ValueError(f'{self.annotations}: {_image(image_id)} of an annotation is not under "images".')
            owner = f"the annotation of {_image(image_id)} in {self.annotations}"
            segments = [
                {
                    "id": _take(segment, "id", int, f"a segment of {owner}"),
                    "label_id": labels.of(_take(segment, "category_id", int, f"a segment of {owner}"), image_id),
                    "iscrowd": _crowd_flag(segment, f"a segment of {owner}"),
                }
                for segment in _take(annotation, "segments_info", list, owner)
            ]
            yield {
                "image_id": image_id,
                "image": _path(self.images, image_names[image_id], f"{_image(image_id)} in {self.annotations}"),
                "annotation": _path(self.segment_maps, annotation, owner),
                "segments": json.dumps(segments),
            }
        labels.check()
        if annotation is None:
            raise ValueError(f'{self.annotations}: there is no annotation, since its array "annotations" is empty.')

    def says_empty(self, row: dict[str, Any]) -> bool:
        return _says_empty(row)

    def read(self, row: dict[str, Any]) -> Sample:
        segment_map = read_color_map(row["annotation"])
        segments = shown_segments(json.loads(row["segments"]), segment_map)
        return Sample(read_image(row["image"]), row["image_id"], row["image"], segments, segment_map)


class CocoInstance(SegmentationSource):
    """COCO instance data: a JSON file with polygons or run-length codes, and the images.

    Objects whose polygons all have fewer than three points are left out.

    Args:
        root: folder with `annotations/instances_{split}.json` and `{split}/` (images).
        split: `train2017`, for example.
        images: folder of images, instead of the one in `root`.
        annotations: JSON file, instead of the one in `root`.
        categories: see `CocoPanoptic`.
        drop_empty: leave out images in which there is no object, or only crowds, as is usual in training. In an
            evaluation they count: what is found there is wrong.

    Raises:
        ValueError: files are not there, or the categories are not right; one line.
    """

    tasks = ("instance",)

    def __init__(
        self,
        root: str | Path | None = None,
        split: str | None = None,
        *,
        images: str | Path | None = None,
        annotations: str | Path | None = None,
        categories: str | Path | None = None,
        drop_empty: bool = False,
    ):
        self.images = _locate("images", images, root, split, "{split}")
        self.annotations = _locate("annotations", annotations, root, split, "annotations/instances_{split}.json")
        self.categories = _coco_categories(self.annotations, categories, "coco_instance")
        self.drop_empty = drop_empty

    def files(self) -> list[Path]:
        return [self.annotations]

    def rows(self) -> Iterator[dict[str, Any]]:
        images = _image_entries(self.annotations)
        labels = _Labels(self.annotations, self.categories)
        shapeless = dropped = 0
        for image_id, annotations in _annotations_by_image(self.annotations, list(images)):
            image = images[image_id]
            owner = f"{_image(image_id)} in {self.annotations}"
            segments = [
                _instance_segment(annotation, labels, image_id, f"an annotation of {owner}")
                for annotation in annotations
            ]
            shaped = [segment for segment in segments if segment["segmentation"]]
            shapeless += len(segments) - len(shaped)
            if self.drop_empty and all(segment["iscrowd"] for segment in shaped):
                dropped += 1
                continue
            yield {
                "image_id": image_id,
                "image": _path(self.images, image, owner),
                "height": image["height"],
                "width": image["width"],
                "segments": json.dumps(shaped),
            }
        labels.check()
        if dropped == len(images):
            raise ValueError(f"{self.annotations}: no image has an object that is no crowd; drop_empty leaves none.")
        if shapeless:
            logger.warning(f"{self.annotations}: {shapeless} objects have no polygon of three points; left out.")

    def says_empty(self, row: dict[str, Any]) -> bool:
        return _says_empty(row)

    def read(self, row: dict[str, Any]) -> Sample:
        image = read_image(row["image"])
        segments, masks = self.read_masks(row, (image.height, image.width))
        return Sample(image, row["image_id"], row["image"], segments, masks=masks)

    def read_masks(self, row: dict[str, Any], image_size: tuple[int, int]) -> tuple[list[dict], list[dict]]:
        """`segments` and `masks` of a `Sample`, without its image.

        Args:
            row: of the image.
            image_size: (height, width) of the image as it was read. The JSON may say none, but no other.

        Raises:
            SampleError: it says another, or a shape cannot be used.
        """
        # Only this needs pycocotools; panoptic data does without.
        from proscale_hf.data.sources.shapes import run_length_code

        check_size((row["height"] or image_size[0], row["width"] or image_size[1]), image_size, row["image"])
        segments, masks = [], []
        for number, segment in enumerate(json.loads(row["segments"]), start=1):
            mask, area = run_length_code(segment.pop("segmentation"), image_size, f"{row['image']}: object {number}")
            masks.append(mask)
            segments.append({"id": number, **segment, "area": area if segment["area"] is None else segment["area"]})
        return segments, masks


def _locate(option: str, given: str | Path | None, root: str | Path | None, split: str | None, *layouts: str) -> Path:
    """Where an option, or `root` and `split`, say that something is: the first of the layouts that is there."""
    if given is None and (root is None or split is None):
        raise ValueError(f"Give root and split, or {option}.")
    candidates = [Path(given)] if given is not None else [Path(root, layout.format(split=split)) for layout in layouts]
    for path in candidates:
        if path.exists():
            return path.absolute()
    raise ValueError(f"There is no {' or '.join(map(str, candidates))}; check {option if given else 'root and split'}.")


def _coco_categories(annotations: Path, given: str | Path | None, known_name: str) -> list[dict[str, Any]]:
    # They often stand at the end of a large file, so they are kept in the cache, too.
    fingerprint = Hasher.hash(("categories", file_states([annotations]), given is None))
    make_rows = partial(_category_rows, annotations, given is None)
    rows = cached_rows(make_rows, fingerprint, f"list of categories in {annotations}")
    categories = json.loads(rows[0]["categories"])
    if given is not None:
        return choose_categories(given, names_by_id(categories), str(annotations))
    if not categories:
        raise ValueError(f"The list of categories in {annotations} is empty.")
    known = load_categories(known_name)
    try:
        check_categories(categories)
        if names_by_id(categories) == names_by_id(known):
            return known
        if known_name == "coco_instance":  # whose own JSON does not say it
            categories = [{"isthing": 1, **category} for category in categories]
        return complete_categories(categories)
    except ValueError as error:
        raise ValueError(f"{annotations}: {error}") from error


def _category_rows(annotations: Path, are_needed: bool) -> Iterator[dict[str, str]]:
    categories = [category for category, _, _ in read_array(annotations, "categories", is_needed=are_needed)]
    yield {"categories": json.dumps(categories)}


def _image_entries(annotations: Path) -> dict[int | str, dict[str, Any]]:
    """`file_name`, `height` and `width` (0 where they are not said) by image id."""
    images = {}
    for image, _, _ in read_array(annotations, "images"):
        image_id = _take(image, "id", (int, str), f"an image in {annotations}")
        if image_id in images:
            raise ValueError(f"{annotations}: {_image(image_id)} is listed twice.")
        owner = f"{_image(image_id)} in {annotations}"
        images[image_id] = {
            "file_name": _take(image, "file_name", str, owner),
            **{key: _take({key: 0, **image}, key, int, owner) for key in ("height", "width")},
        }
    if len({type(image_id) for image_id in images}) > 1:
        raise ValueError(f"{annotations}: ids of images must be of one kind, numbers or texts.")
    return images


def _annotations_by_image(path: Path, image_ids: list[int | str]) -> Iterator[tuple[int | str, list[dict[str, Any]]]]:
    """The annotations of each image. They stand in any order, so where they are is noted, and then they are read."""
    position_of = {image_id: position for position, image_id in enumerate(image_ids)}
    owners, starts, lengths = array("q"), array("q"), array("q")
    for annotation, start, length in read_array(path, "annotations"):
        image_id = _take(annotation, "image_id", (int, str), f"an annotation in {path}")
        if image_id not in position_of:
            raise ValueError(f'{path}: {_image(image_id)} of an annotation is not under "images".')
        owners.append(position_of[image_id])
        starts.append(start)
        lengths.append(length)
    order = np.argsort(np.asarray(owners), kind="stable")
    ends = np.searchsorted(np.asarray(owners)[order], np.arange(len(image_ids)), side="right")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        first = 0
        for image_id, end in zip(image_ids, ends, strict=True):
            yield image_id, [json.loads(text[starts[i] : starts[i] + lengths[i]]) for i in order[first:end]]
            first = end


def _image(image_id: int | str) -> str:
    """What messages call an image."""
    return f"image {printable(str(image_id))}"


class _Labels:
    """Label ids of category ids; remembers the ones that are not in the list, so that all of them can be named."""

    def __init__(self, annotations: Path, categories: Iterable[Mapping[str, Any]]):
        self.annotations = annotations
        self.label_of = {category["id"]: label for label, category in enumerate(categories)}
        self.unknown: Counter[int] = Counter()
        self.example: int | str = ""

    def of(self, category_id: int, image_id: int | str) -> int:
        label = self.label_of.get(category_id)
        if label is None:
            self.unknown[category_id] += 1
            self.example = self.example or image_id
        return label

    def check(self) -> None:
        if self.unknown:
            ids = ", ".join(f"{category} ({count} times)" for category, count in sorted(self.unknown.items())[:10])
            raise ValueError(
                f"{self.annotations}: segments have category ids that are not among the {len(self.label_of)} "
                f"categories: {ids}; image {self.example}, for example."
            )


def _instance_segment(annotation: dict[str, Any], labels: _Labels, image_id: int | str, owner: str) -> dict[str, Any]:
    shape = _take(annotation, "segmentation", (list, dict), owner)
    if isinstance(shape, list):
        try:
            shape = polygons_of(shape)
        except ValueError as error:
            raise ValueError(f'"segmentation" in {owner} {error}.') from error
    return {
        "label_id": labels.of(_take(annotation, "category_id", int, owner), image_id),
        "iscrowd": _crowd_flag(annotation, owner),
        "area": _area(annotation.get("area")),
        "segmentation": shape,
    }


def _crowd_flag(segment: dict[str, Any], owner: str) -> int:
    try:
        return crowd_flag(segment.get("iscrowd", 0))
    except ValueError as error:
        raise ValueError(f"{owner}: {error}.") from error


def _area(value: Any) -> float | None:
    """An area as it is annotated; None where it is no number that can be used."""
    return float(value) if type(value) in (int, float) and 0 <= value <= LARGEST_NUMBER else None


def _says_empty(row: dict[str, Any]) -> bool:
    return all(segment["iscrowd"] for segment in json.loads(row["segments"]))


def _path(folder: Path, entry: Any, owner: str) -> str:
    """The path of the file that a JSON object names."""
    name = _take(entry, "file_name", str, owner)
    try:
        return str(path_inside(folder, name))
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from error


def _take(entry: Any, key: str, kind: type | tuple[type, ...], owner: str) -> Any:
    """A value of a JSON object, if it is of the kind that it must be."""
    value = entry.get(key) if isinstance(entry, dict) else None
    is_right = isinstance(value, kind) and not isinstance(value, bool)
    if not is_right or (isinstance(value, int) and abs(value) > LARGEST_NUMBER):
        raise ValueError(f'"{key}" of {owner} is missing or wrong: {shown(value)}.')
    return value
