"""Cityscapes, read from its own folders.

A pixel of an `*_instanceIds.png` is the id of its class, or, where objects are told apart, id * 1000 + number. An id
alone of a class that has instances is a group of objects, which is a crowd. Classes that the evaluation leaves out are
void. These are the rules of `createPanopticImgs.py` in `cityscapesscripts`, whose image and segment ids are kept, so
that predictions fit its evaluation.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from proscale_hf.data.categories import load_categories
from proscale_hf.data.dataset import SegmentationSource
from proscale_hf.data.reading import read_image, read_value_map
from proscale_hf.data.sample import Sample, SampleError, distinct_values
from proscale_hf.data.sources.partners import common_names, files_by_name, split_folder
from proscale_hf.files.text import few
from proscale_hf.processing.segment_ids import VOID_ID


IMAGE_ENDING = "_leftImg8bit.png"
ANNOTATION_ENDINGS = {"panoptic": "_gtFine_instanceIds.png", "semantic": "_gtFine_labelIds.png"}
CLASS_IDS = range(34)  # all that are drawn, those among them that do not count in the evaluation
INSTANCES = 1000  # values per class


class Cityscapes(SegmentationSource):
    """Street scenes of 19 classes, with fine annotations.

        root/leftImg8bit/{split}/{city}/{name}_leftImg8bit.png
        root/gtFine/{split}/{city}/{name}_gtFine_instanceIds.png

    Args:
        root: the folder that has `leftImg8bit` and `gtFine`.
        split: `train`, `val` or `test`.
        task: "panoptic", or "semantic": one segment per class, from `*_gtFine_labelIds.png`.

    Raises:
        ValueError: there is no such folder, or an option is wrong; one line.
    """

    def __init__(self, root: str | Path, split: str, *, task: Literal["panoptic", "semantic"] = "panoptic"):
        if task not in list(ANNOTATION_ENDINGS):
            raise ValueError(f"task must be one of {', '.join(ANNOTATION_ENDINGS)}, got {task!r}.")
        self.images = split_folder(Path(root, "leftImg8bit"), split)
        self.annotations = split_folder(Path(root, "gtFine"), split)
        self.task = task
        self.tasks = ("semantic",) if task == "semantic" else SegmentationSource.tasks
        self.categories = load_categories("cityscapes")

    def files(self) -> list[Path]:
        folders = (self.images, self.annotations)
        return [*folders, *sorted(city for folder in folders for city in folder.iterdir() if city.is_dir())]

    def rows(self) -> Iterator[dict[str, str]]:
        images = files_by_name(self.images.glob("*/*"), [IMAGE_ENDING])
        annotations = files_by_name(self.annotations.glob("*/*"), [ANNOTATION_ENDINGS[self.task]])
        for name in common_names({self.images: images, self.annotations: annotations}):
            yield {"image_id": name, "image": str(images[name]), "annotation": str(annotations[name])}

    def read(self, row: dict[str, Any]) -> Sample:
        values = read_value_map(row["annotation"])
        present = distinct_values(values)
        class_ids = np.where(present < INSTANCES, present, present // INSTANCES)
        if unknown := present[~np.isin(class_ids, CLASS_IDS)].tolist():
            raise SampleError(f"{row['annotation']}: values {few(unknown)} stand for no class of Cityscapes.")

        label_of = {category["id"]: label for label, category in enumerate(self.categories)}
        segments = [
            {"id": value, "label_id": label_of[class_id], "iscrowd": self._is_crowd(value, label_of[class_id])}
            for value, class_id in zip(present.tolist(), class_ids.tolist(), strict=True)
            if class_id in label_of
        ]
        counted = np.isin(present, [segment["id"] for segment in segments])
        segment_map = np.where(counted, present, VOID_ID)[np.searchsorted(present, values)]
        return Sample(read_image(row["image"]), row["image_id"], row["image"], segments, segment_map)

    def _is_crowd(self, value: int, label: int) -> int:
        return int(self.task == "panoptic" and value < INSTANCES and bool(self.categories[label]["isthing"]))
