"""A first look at a data set, before a model is trained on it: what is there, how often, and what cannot be used."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from proscale_hf.data.dataset import SegmentationDataset
from proscale_hf.data.sample import Sample, SampleError
from proscale_hf.visualization import Segment, segments_from_result


NAMED = 10  # files that a report names of each kind


@dataclass
class ClassCount:
    """
    Attributes:
        images: with the class, in a crowd or otherwise.
        segments: of the class, crowds aside.
        crowds: many objects, not told apart.
        pixels: of segments and crowds.
    """

    images: int = 0
    segments: int = 0
    crowds: int = 0
    pixels: int = 0


@dataclass
class FirstLook:
    """What was seen of a data set.

    Attributes:
        categories: the data set's categories, in label order.
        classes: the counts of each.
        sizes: how many images there are of each (height, width), in pixels.
        empty: how many images have nothing to train on (no segment, or crowds alone).
        empty_files: the first of them.
        unusable: how many images or annotations cannot be used.
        errors: what is wrong with the first of those, one line each, with the file.
    """

    categories: list[dict[str, Any]]
    classes: list[ClassCount]
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    empty: int = 0
    empty_files: list[str] = field(default_factory=list)
    unusable: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        """How many images can be used."""
        return self.sizes.total()

    @property
    def pixels(self) -> int:
        """Of all images that can be used."""
        return sum(height * width * number for (height, width), number in self.sizes.items())

    @property
    def absent(self) -> list[str]:
        """Names of the classes that never occur."""
        counts = zip(self.categories, self.classes, strict=True)
        return [category["name"] for category, count in counts if not count.images]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        sizes = [{"height": height, "width": width, "images": number} for (height, width), number in self._by_area()]
        named = zip(self.categories, values.pop("classes"), strict=True)
        classes = [{"id": category["id"], "name": category["name"], **count} for category, count in named]
        return {"images": self.images, **values, "sizes": sizes, "absent": self.absent, "classes": classes}

    def to_text(self) -> str:
        """A report for the terminal."""
        lines = [self._images_line()]
        if self.empty and self.empty == self.images:
            lines.append("There is nothing to train on: no image has an object. Crowds and void are no objects.")
        elif self.empty:
            lines.append(f"{self.empty} with nothing to train on: {_listed(self.empty_files, self.empty)}")
        if self.unusable:
            lines += [f"{self.unusable} cannot be used:", *(f"  {error}" for error in self.errors)]
            if self.unusable > len(self.errors):
                lines.append(f"  and {self.unusable - len(self.errors)} more")
        width = max(len(category["name"]) for category in self.categories)
        lines += ["", f"{'class':{width}} {'kind':>6} {'images':>8} {'segments':>9} {'crowds':>7} {'pixels':>8}"]
        for category, count in zip(self.categories, self.classes, strict=True):
            if count.images:
                kind = "thing" if category["isthing"] else "stuff"
                numbers = f"{count.images:8} {count.segments:9} {count.crowds:7} {count.pixels / self.pixels:8.2%}"
                lines.append(f"{category['name']:{width}} {kind:>6} {numbers}")
        if self.absent:
            lines.append(f"{len(self.absent)} of {len(self.classes)} classes never occur: {_listed(self.absent)}")
        return "\n".join(lines)

    def _images_line(self) -> str:
        by_area = self._by_area()
        if not by_area:
            return "0 images can be used"
        ranks = np.cumsum([number for _, number in by_area])
        median = by_area[int(np.searchsorted(ranks, (self.images + 1) // 2))][0]
        sizes = ((by_area[0][0], "smallest"), (median, "median"), (by_area[-1][0], "largest"))
        described = ", ".join(f"{name} {height} x {width}" for (height, width), name in sizes)
        return f"{self.images} images (height x width: {described})"

    def _by_area(self) -> list[tuple[tuple[int, int], int]]:
        return sorted(self.sizes.items(), key=lambda entry: (entry[0][0] * entry[0][1], entry))


@dataclass
class _Summary:
    """What a worker says of one image: per segment its label, whether it is a crowd, and its pixels."""

    file_name: str
    size: tuple[int, int]
    segments: list[tuple[int, int, int]]


class _Summaries(Dataset):
    """Summaries of a data set's images; of those that cannot be used a text that says why."""

    def __init__(self, dataset: SegmentationDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Summary | str:
        try:
            sample = self.dataset.read(index)
        except SampleError as error:
            return str(error)
        areas = segment_areas(sample)
        segments = [
            (segment["label_id"], segment["iscrowd"], area)
            for segment, area in zip(sample.segments, areas, strict=True)
        ]
        return _Summary(sample.file_name, (sample.image.height, sample.image.width), segments)


def look(dataset: SegmentationDataset, workers: int = 0) -> FirstLook:
    """Read all of a data set and count what is there. One image is held at a time.

    Args:
        dataset: the data set; what cannot be used is counted, whatever its `on_error` says.
        workers: processes that read; 0 for this one.
    """
    seen = FirstLook(dataset.categories, [ClassCount() for _ in dataset.categories])
    summaries = DataLoader(_Summaries(dataset), batch_size=None, num_workers=workers)
    for summary in tqdm(summaries, unit="image", leave=False, disable=None):
        if isinstance(summary, str):
            seen.unusable += 1
            seen.errors += [summary][: NAMED - len(seen.errors)]
        else:
            _count(seen, summary)
    return seen


def _count(seen: FirstLook, summary: _Summary) -> None:
    seen.sizes[summary.size] += 1
    if all(is_crowd or not area for _, is_crowd, area in summary.segments):
        seen.empty += 1
        seen.empty_files += [summary.file_name][: NAMED - len(seen.empty_files)]
    for label_id in {label_id for label_id, _, _ in summary.segments}:
        seen.classes[label_id].images += 1
    for label_id, is_crowd, area in summary.segments:
        count = seen.classes[label_id]
        count.pixels += area
        if is_crowd:
            count.crowds += 1
        else:
            count.segments += 1


def _listed(names: Sequence[str], number: int | None = None) -> str:
    """The first of so many names."""
    shown = ", ".join(names[:NAMED])
    return f"{shown}, ..." if (number or len(names)) > NAMED else shown


def segment_areas(sample: Sample) -> list[int]:
    """Pixels of each segment, in the order of `sample.segments`."""
    if sample.segment_map is None:
        from pycocotools import mask as coco_mask  # optional: only instance data needs it

        return [int(coco_mask.area(mask)) for mask in sample.masks]
    ids, counts = np.unique(sample.segment_map, return_counts=True)
    area_of = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    return [area_of[segment["id"]] for segment in sample.segments]


def segments_to_draw(sample: Sample, categories: Sequence[dict[str, Any]]) -> list[Segment]:
    """The annotation of an image, for `visualization.draw_segments`; crowds say that they are."""
    id2label = {label_id: category["name"] for label_id, category in enumerate(categories)}
    stuff = [label_id for label_id, category in enumerate(categories) if not category["isthing"]]
    if sample.segment_map is None:
        from pycocotools import mask as coco_mask  # optional: only instance data needs it

        shown = [(segment, coco_mask.decode(mask)) for segment, mask in zip(sample.segments, sample.masks, strict=True)]
    else:
        shown = [(segment, sample.segment_map == segment["id"]) for segment in sample.segments]
    drawn = []
    for segment, mask in shown:
        info = {"id": segment["id"], "label_id": segment["label_id"], "score": 1.0}
        result = {"segments_info": [info], "segmentation": mask[None]}
        for found in segments_from_result(result, id2label, stuff):
            label = f"{found.label} (crowd)" if segment["iscrowd"] else found.label
            drawn.append(replace(found, label=label, score=None))
    return drawn
