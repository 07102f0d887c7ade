"""A data set in the format of `datasets`, on the Hub or on disk, with a column of images and one of annotations."""

import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets.utils.file_utils import is_local_path, xopen
from PIL import Image

from proscale_hf.data.dataset import SegmentationSource, choose_categories
from proscale_hf.data.reading import (
    color_ids_of,
    label_finder,
    open_map,
    read_image,
    segments_from_values,
    shown_segments,
    values_of,
)
from proscale_hf.data.sample import Sample, SampleError, distinct_values
from proscale_hf.files.reading import reading
from proscale_hf.files.text import few, one_line
from proscale_hf.processing.run_length import encode_mask
from proscale_hf.processing.segment_ids import crowd_flag


FORMS = ("semantic", "instance", "panoptic")


class HubDataset(SegmentationSource):
    """Rows of images and annotation pictures. Code that comes with a data set is not run.

    Args:
        path: an id on the Hub, a folder that `save_to_disk` wrote, or whatever else `datasets.load_dataset` takes.
        split: `train`, for example; slices such as `train[:90%]` work.
        categories: a name of `CATEGORY_SETS`, or a file that `read_categories` takes.
        form: what the annotation pictures hold.
            "semantic": a category id per pixel, in one channel.
            "instance": red is the category id, green the number of the object in the image, 0 where there is none; the
            convention of transformers' example scripts.
            "panoptic": ids as red + 256 green + 256^2 blue; another column lists the segments, each with `id`,
            `category_id`, and `iscrowd` where it is one.
        image_column: of pictures.
        annotation_column: of pictures.
        segments_column: of lists of segments, for "panoptic".
        id_column: of ids of images; default: the number of the row.
        reduce_labels: the pictures' category ids are one too high, and 0 stands for none.
        void: in "semantic", values that mean nobody knows. Default: of 0 and 255 those that stand for no category.
        configuration: of the data set, if it has several.
        revision: of the data set on the Hub.

    Raises:
        ValueError: the data set cannot be had, or has no such columns, or an option is wrong; one line.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        categories: str | Path | list[dict[str, Any]],
        *,
        form: Literal["semantic", "instance", "panoptic"] = "semantic",
        image_column: str = "image",
        annotation_column: str = "annotation",
        segments_column: str = "segments_info",
        id_column: str | None = None,
        reduce_labels: bool = False,
        void: int | Sequence[int] | None = None,
        configuration: str | None = None,
        revision: str | None = None,
    ):
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}.")
        label_finder(choose_categories(categories), void)  # refuses what is wrong before anything is downloaded
        self.tasks = SegmentationSource.tasks if form == "panoptic" else (form,)
        self.path, self.form, self.void, self.reduce_labels = str(path), form, void, reduce_labels
        self.image_column, self.annotation_column, self.id_column = image_column, annotation_column, id_column
        self.segments_column = segments_column if form == "panoptic" else None
        self.table = self._needed_columns(_load_table(self.path, split, configuration, revision))
        self.categories = choose_categories(categories, self._own_names(), f"column {self.segments_column} of {path}")

    def _needed_columns(self, table: datasets.Dataset) -> datasets.Dataset:
        features = table.features
        columns = [self.image_column, self.annotation_column, self.segments_column, self.id_column]
        columns = [column for column in columns if column is not None]
        if missing := [column for column in columns if column not in features]:
            raise ValueError(f"{self.path} has no column {', '.join(missing)}; it has {', '.join(features)}.")
        for column in (self.image_column, self.annotation_column):
            if not isinstance(features[column], datasets.Image):
                raise ValueError(f"Column {column} of {self.path} must hold images, but is {features[column]}.")
            table = table.cast_column(column, datasets.Image(decode=False))  # files are opened with care here
        return table.select_columns(columns)

    def _own_names(self) -> dict[int, str]:
        """What the table itself calls the ids of categories, if it does."""
        feature = self.table.features.get(self.segments_column)
        while hasattr(feature, "feature") or isinstance(feature, list):  # of a list
            feature = feature[0] if isinstance(feature, list) else feature.feature
        kind = feature.get("category_id") if isinstance(feature, dict) else None
        kind = getattr(kind, "feature", kind)
        if not isinstance(kind, datasets.ClassLabel):
            return {}
        return {value - int(self.reduce_labels): name for value, name in enumerate(kind.names)}

    def files(self) -> list[str]:
        return [file["filename"] for file in self.table.cache_files]

    def rows(self) -> Iterator[dict[str, Any]]:
        ids = range(len(self.table)) if self.id_column is None else self.table[self.id_column]
        for index, image_id in enumerate(ids):
            yield {"image_id": image_id, "image": f"{self.path}, row {index}", "index": index}

    def read(self, row: dict[str, Any]) -> Sample:
        name = row["image"]
        entry = self.table[row["index"]]
        if entry[self.image_column] is None or entry[self.annotation_column] is None:
            raise SampleError(f"{name}: there is no image or no annotation.")
        image_name, map_name = f"{name}, {self.image_column}", f"{name}, {self.annotation_column}"
        picture = open_map(_file_of(entry[self.annotation_column], map_name), map_name, upright=True)
        read_form = {"semantic": self._semantic, "instance": self._instance, "panoptic": self._panoptic}[self.form]
        return Sample(
            image=read_image(_file_of(entry[self.image_column], image_name), image_name),
            image_id=row["image_id"],
            file_name=name,
            **read_form(picture, entry, map_name),
        )

    def _semantic(self, picture: Image.Image, _: dict[str, Any], name: str) -> dict[str, Any]:
        shift = 1 if self.reduce_labels else 0
        find_label = label_finder(self.categories, self.void, lambda value: value - shift)
        segment_map, segments = segments_from_values(values_of(picture, name), find_label, name)
        return {"segment_map": segment_map, "segments": segments}

    def _instance(self, picture: Image.Image, _: dict[str, Any], name: str) -> dict[str, Any]:
        from pycocotools import mask as coco_mask  # optional: only this form needs it

        codes = color_ids_of(picture, name) & 0xFFFF  # (height, width): category + 256 * number
        objects = [code for code in distinct_values(codes).tolist() if code >= 256]
        labels = self._labels([code % 256 for code in objects], name)
        masks = [encode_mask(codes == code) for code in objects]
        segments = [
            {"id": number, "label_id": label, "iscrowd": 0, "area": int(coco_mask.area(mask))}
            for number, (label, mask) in enumerate(zip(labels, masks, strict=True), start=1)
        ]
        return {"masks": masks, "segments": segments}

    def _panoptic(self, picture: Image.Image, entry: dict[str, Any], name: str) -> dict[str, Any]:
        listed = entry[self.segments_column]
        if isinstance(listed, dict):  # how `datasets` holds a `Sequence` of dicts
            listed = [dict(zip(listed, values, strict=True)) for values in zip(*listed.values(), strict=True)]
        try:
            labels = self._labels([segment["category_id"] for segment in listed], name)
            segments = [
                {"id": segment["id"], "label_id": label, "iscrowd": crowd_flag(segment.get("iscrowd") or 0)}
                for segment, label in zip(listed, labels, strict=True)
            ]
        except ValueError as error:
            raise SampleError(f"{name}: {error}.") from error
        except (KeyError, TypeError, AttributeError):
            raise SampleError(
                f'{name}: {self.segments_column} must list segments with "id" and "category_id", got '
                f"{reprlib.repr(listed)}."
            ) from None
        segment_map = color_ids_of(picture, name)
        return {"segment_map": segment_map, "segments": shown_segments(segments, segment_map)}

    def _labels(self, values: list[int], name: str) -> list[int]:
        label_of = {category["id"]: label for label, category in enumerate(self.categories)}
        category_ids = [value - 1 if self.reduce_labels else value for value in values]
        if unknown := set(category_ids) - set(label_of):
            raise SampleError(f"{name}: ids {few(unknown)} are not among the {len(label_of)} categories.")
        return [label_of[category_id] for category_id in category_ids]


def _file_of(entry: dict[str, Any], name: str) -> str | bytes:
    """The content of an image file, or where it lies on this disk."""
    content, path = entry["bytes"], entry["path"]
    if content is not None:
        return content
    if path is None:
        raise SampleError(f"{name} has neither bytes nor a path.")
    if is_local_path(path):
        return path
    with reading(path, error_type=SampleError), xopen(path, "rb") as file:
        return file.read()


def _load_table(path: str, split: str, configuration: str | None, revision: str | None) -> datasets.Dataset:
    try:
        if any(Path(path, name).is_file() for name in ("state.json", "dataset_dict.json")):
            table = datasets.load_from_disk(path)
            return table[split] if isinstance(table, datasets.DatasetDict) else table
        return datasets.load_dataset(path, configuration, split=split, revision=revision)
    except Exception as error:  # of the file system, the network, the Hub, Arrow
        raise ValueError(f"The data set {path}, split {split}, cannot be had: {one_line(error)}") from error
