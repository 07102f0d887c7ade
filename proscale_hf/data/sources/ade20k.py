"""ADE20K's scene parsing benchmark: 150 classes, 100 of them with instances, read from its own folders.

A pixel in `annotations` is 0, which is void, or its class, counted from 1. In `annotations_instance`, red is the class
among those that have instances, counted from 1, and green the object's number in the image, 0 where there is none.

The two were not made from each other. Panoptic segments are, as in Mask2Former's preparation of the data: stuff from
`annotations`, and over it all objects. A pixel that is a thing in `annotations` alone is void. The truth of semantic
segmentation remains `annotations`.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from proscale_hf.data.categories import load_categories
from proscale_hf.data.dataset import SegmentationSource
from proscale_hf.data.reading import label_finder, read_color_map, read_image, read_value_map, segments_from_values
from proscale_hf.data.sample import Sample, SampleError, distinct_values
from proscale_hf.data.sources.partners import common_names, files_by_name, split_folder
from proscale_hf.files.text import few
from proscale_hf.processing.segment_ids import VOID_ID


CATEGORY_SETS = {"panoptic": "ade20k_panoptic", "semantic": "ade20k_semantic"}
SPLIT_FOLDERS = {"train": "training", "val": "validation"}
NUMBERS = 256  # of objects in an image, 0 among them


class Ade20k(SegmentationSource):
    """Indoor and outdoor scenes.

        root/images/training/{name}.jpg
        root/annotations/training/{name}.png
        root/annotations_instance/training/{name}.png

    Args:
        root: the folder `ADEChallengeData2016`.
        split: `train` or `val`, or the folder's name.
        task: "panoptic", or "semantic", which does without `annotations_instance`. Ids of categories are those that are
            usual: from 0 in panoptic, from 1 in semantic data.

    Raises:
        ValueError: there is no such folder, or an option is wrong; one line.
    """

    def __init__(self, root: str | Path, split: str, *, task: Literal["panoptic", "semantic"] = "panoptic"):
        if task not in list(CATEGORY_SETS):
            raise ValueError(f"task must be one of {', '.join(CATEGORY_SETS)}, got {task!r}.")
        kinds = ["images", "annotations"] + ["annotations_instance"] * (task == "panoptic")
        self.folders = {kind: split_folder(Path(root, kind), SPLIT_FOLDERS.get(split, split)) for kind in kinds}
        self.task = task
        self.tasks = ("semantic",) if task == "semantic" else SegmentationSource.tasks
        self.categories = load_categories(CATEGORY_SETS[task])

    def files(self) -> list[Path]:
        return list(self.folders.values())

    def rows(self) -> Iterator[dict[str, str]]:
        kinds = {
            kind: files_by_name(folder.iterdir(), [".jpg" if kind == "images" else ".png"])
            for kind, folder in self.folders.items()
        }
        for name in common_names({self.folders[kind]: files for kind, files in kinds.items()}):
            paths = {kind: str(files[name]) for kind, files in kinds.items()}
            yield {"image_id": name, "image": paths.pop("images"), **paths}

    def read(self, row: dict[str, Any]) -> Sample:
        classes = read_value_map(row["annotations"])
        if self.task == "semantic":
            find_label = label_finder(self.categories, void=0)
            segment_map, segments = segments_from_values(classes, find_label, row["annotations"])
            return Sample(read_image(row["image"]), row["image_id"], row["image"], segments, segment_map)

        self._check_classes(classes, row["annotations"])
        segment_map, segments = self._panoptic(classes, row["annotations_instance"])
        image = read_image(row["image"])
        return SampleWithClasses(image, row["image_id"], row["image"], segments, segment_map, classes=classes)

    def _check_classes(self, classes: np.ndarray, name: str) -> None:
        if unknown := set(distinct_values(classes).tolist()) - set(range(len(self.categories) + 1)):
            raise SampleError(f"{name}: values {few(unknown)} stand for no category.")

    def _panoptic(self, classes: np.ndarray, instance_file: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Segments and their map: ids are 1 + label for stuff, and those above are the objects'."""
        codes = read_color_map(instance_file) & 0xFFFF  # (height, width): red + 256 green
        if codes.shape != classes.shape:
            sizes = " and ".join("{} x {}".format(*size) for size in (codes.shape, classes.shape))
            raise SampleError(f"{instance_file} and its partner in annotations differ in size: {sizes}.")
        labels = self._object_labels(codes, instance_file)
        numbers, last_class = codes // NUMBERS, len(self.categories)
        is_stuff = np.array([False] + [not category["isthing"] for category in self.categories])
        stuff = np.where(is_stuff[classes], classes, VOID_ID)
        segment_map = np.where(numbers > 0, last_class + numbers, stuff)
        label_of = {last_class + number: label for number, label in labels.items()}
        segments = [
            {"id": segment_id, "label_id": label_of.get(segment_id, segment_id - 1), "iscrowd": 0}
            for segment_id in distinct_values(segment_map).tolist()
            if segment_id != VOID_ID
        ]
        return segment_map.astype(np.int32), segments

    def _object_labels(self, codes: np.ndarray, name: str) -> dict[int, int]:
        """The label of each object by its number."""
        things = [label for label, category in enumerate(self.categories) if category["isthing"]]
        pairs = [divmod(code, NUMBERS) for code in distinct_values(codes).tolist() if code >= NUMBERS]
        if unknown := {thing for _, thing in pairs if not 1 <= thing <= len(things)}:
            raise SampleError(f"{name}: red values {few(unknown)} stand for no category.")
        pairs_of = Counter(number for number, _ in pairs)
        if several := [number for number, count in pairs_of.items() if count > 1]:
            raise SampleError(f"{name}: objects (green values) {few(several)} are of more than one category.")
        return {number: things[thing - 1] for number, thing in pairs}


@dataclass
class SampleWithClasses(Sample):
    """A sample whose annotation tells the classes of pixels apart from its segments.

    Attributes:
        classes: `(height, width)`, 1 + label, 0 for void.
    """

    classes: np.ndarray = field(kw_only=True)

    def label_map(self, void: int = 255) -> np.ndarray:
        """The class of each pixel as annotated: `(height, width)` int32 with label ids, and `void` in void."""
        return np.where(self.classes > 0, self.classes - 1, void).astype(np.int32)
