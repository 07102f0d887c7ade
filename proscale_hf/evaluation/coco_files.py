"""Predictions as COCO files, written while they are made.

    FOLDER/panoptic/*.png, FOLDER/panoptic.json     COCO-panoptic format
    FOLDER/instances.json                           COCO results format
    FOLDER/semantic/*.png                           the data set's category id of each pixel

Category ids are the data set's own. Nothing is held in memory: each process appends to text files of its own, a line
per prediction, and in the end one of them puts the lines together.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image
from scipy import ndimage

from proscale_hf.data.sample import Sample
from proscale_hf.files.whole import writing
from proscale_hf.processing.segment_ids import encode_ids


PART = ".jsonl"


class PredictionFiles(contextlib.AbstractContextManager):
    """Writes one process's predictions; `close` them, then `merge_parts`.

    Args:
        folder: where to; it must be there.
        categories: of the data set, in label order.
        rank: of the process among those that write into the folder.

    Raises:
        ValueError: a file cannot be written, or two images would have the same file.
    """

    def __init__(self, folder: Path, categories: Sequence[Mapping[str, Any]], rank: int = 0):
        self.folder = Path(folder)
        self.categories = list(categories)
        self.rank = rank
        self.lines: dict[str, TextIO] = {}

    def add_panoptic(self, sample: Sample, segment_map: np.ndarray, segments: Sequence[Mapping[str, Any]]) -> None:
        """
        Args:
            sample: the image.
            segment_map: `(height, width)` ids of segments, 0 for none.
            segments: "id" and "category_id" of each.
        """
        file_name = self._save_png("panoptic", sample, encode_ids(segment_map))
        boxes = ndimage.find_objects(segment_map)
        areas = np.bincount(segment_map.ravel())
        segments_info = [
            {**segment, "area": int(areas[segment["id"]]), "bbox": as_bbox(boxes[segment["id"] - 1]), "iscrowd": 0}
            for segment in segments
        ]
        size = {"height": sample.image.height, "width": sample.image.width}
        image = {"id": sample.image_id, "file_name": Path(sample.file_name).name, **size}
        annotation = {"image_id": sample.image_id, "file_name": file_name, "segments_info": segments_info}
        self._append("images", [image])
        self._append("annotations", [annotation])

    def add_instances(self, sample: Sample, instances: Iterable[Mapping[str, Any]]) -> None:
        """
        Args:
            sample: the image.
            instances: "category_id", "segmentation" (run-length code, counts as text) and "score" of each.
        """
        self._append("instances", ({"image_id": sample.image_id, **instance} for instance in instances))

    def add_semantic(self, sample: Sample, label_map: np.ndarray) -> None:
        """
        Args:
            sample: the image.
            label_map: `(height, width)` labels of the data set.

        Raises:
            ValueError: an id of a category does not fit into a pixel.
        """
        ids = np.array([category["id"] for category in self.categories])
        dtype = np.uint8 if ids.max() < 256 else np.uint16
        if ids.max() > np.iinfo(dtype).max:
            raise ValueError(
                f"Semantic predictions cannot be saved: the category id {ids.max()} is above 65535, the largest that a "
                "PNG file can hold."
            )
        self._save_png("semantic", sample, ids.astype(dtype)[label_map])

    def close(self) -> None:
        """No more predictions come from this process."""
        for file in self.lines.values():
            with writing(file.name):
                file.close()
        self.lines.clear()

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _save_png(self, kind: str, sample: Sample, pixels: np.ndarray) -> str:
        """Write a picture into a folder of its kind; its name."""
        file_name = f"{picture_name(sample.image_id)}.png"
        path = self.folder / kind / file_name
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            if path.exists():
                raise ValueError(f"{path} is there already: another image's id gives the same file name.")
            with path.open("wb") as file:
                Image.fromarray(pixels).save(file, format="PNG")
        return file_name

    def _append(self, kind: str, entries: Iterable[Mapping[str, Any]]) -> None:
        path = self.folder / f"{kind}.{self.rank}{PART}"
        with writing(path):
            if kind not in self.lines:
                self.lines[kind] = path.open("x")
            self.lines[kind].writelines(f"{json.dumps(entry)}\n" for entry in entries)


def merge_parts(folder: Path, categories: Sequence[Mapping[str, Any]]) -> None:
    """Make JSON files of the lines that the processes have written, once all of them are closed.

    Args:
        folder: of the predictions.
        categories: of the data set.

    Raises:
        ValueError: a file cannot be written.
    """
    kinds = {path.name.split(".")[0] for path in folder.glob(f"*{PART}")}
    if "annotations" in kinds:
        with writing(folder / "panoptic.json") as path, path.open("x") as file:
            file.write('{"images": ')
            write_array(file, folder, "images")
            file.write(', "annotations": ')
            write_array(file, folder, "annotations")
            file.write(f', "categories": {json.dumps(list(categories))}}}\n')
    if "instances" in kinds:
        with writing(folder / "instances.json") as path, path.open("x") as file:
            write_array(file, folder, "instances")
            file.write("\n")
    for path in folder.glob(f"*{PART}"):
        path.unlink()


def write_array(file: TextIO, folder: Path, kind: str) -> None:
    """Write the lines of all processes as one JSON array, an entry per line."""
    separator = "[\n"
    for part in sorted(folder.glob(f"{kind}.*{PART}")):
        with part.open() as lines:
            for line in lines:
                file.write(separator + line.rstrip("\n"))
                separator = ",\n"
    file.write("[]" if separator == "[\n" else "\n]")


def picture_name(image_id: int | str) -> str:
    """The name of an image's PNG files, without ending: for numbers COCO's, with twelve digits."""
    return f"{image_id:012d}" if isinstance(image_id, int) else re.sub(r"[^\w.-]", "_", image_id)


def as_bbox(box: tuple[slice, slice]) -> list[int]:
    """COCO's [left, top, width, height] of a slice of rows and one of columns."""
    rows, columns = box
    return [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
