"""One image with its segments, as every data set hands them out, checked.

The segments are held as a map of ids where no two overlap (panoptic and semantic data), else as one run-length code per
object (instance data).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from proscale_hf.files.text import few
from proscale_hf.processing.packed_masks import number_of_planes, pack_segment_map
from proscale_hf.processing.segment_ids import VOID_ID


LARGEST_PLANES = 2**33  # bytes of the packed masks of an image


class SampleError(ValueError):
    """An image or its annotation cannot be used; the one-line message names the file and what is wrong with it."""


@dataclass
class Sample:
    """One image and its segments.

    Attributes:
        image: RGB picture, upright.
        image_id: the data set's own id of the image.
        file_name: the image's file, for messages.
        segments: per segment a dict with `"id"` (positive, unique), `"label_id"` (its category's place in the data
            set's list) and `"iscrowd"` (1: many objects, not told apart); instance data adds `"area"` (pixels, as
            annotated). In the order of `masks`, if there are masks.
        segment_map: `(height, width)` int32 map of segment ids; 0 is void, where nobody knows what there is.
        masks: compressed COCO run-length codes, see `processing/run_length.py`, one per segment. They may overlap.
            Pixels of no mask are background.

    Raises:
        SampleError: image and annotation differ in size, or map and list of segments in their ids, or not exactly one
            of `segment_map` and `masks` is given.
    """

    image: Image.Image
    image_id: int | str
    file_name: str
    segments: list[dict[str, Any]]
    segment_map: np.ndarray | None = None
    masks: list[dict[str, Any]] | None = None

    def __post_init__(self):
        if (self.segment_map is None) == (self.masks is None):
            raise SampleError(f"{self.file_name}: a sample has either a segment map or masks.")
        ids = [segment["id"] for segment in self.segments]
        if len(set(ids)) < len(ids) or min(ids, default=1) <= VOID_ID:
            raise SampleError(f"{self.file_name}: ids of segments must be positive and unique, got {few(ids)}.")
        if self.segment_map is not None:
            self._check_size(self.segment_map.shape)
            self._check_ids(set(ids))
        else:
            self._check_masks()

    def _check_size(self, size: tuple[int, ...]) -> None:
        check_size(size, (self.image.height, self.image.width), self.file_name)

    def _check_ids(self, listed: set[int]) -> None:
        in_map = set(distinct_values(self.segment_map).tolist()) - {VOID_ID}
        if in_map != listed:
            raise SampleError(
                f"{self.file_name}: the map and the list of segments differ: ids {few(in_map - listed)} are in the map "
                f"alone, ids {few(listed - in_map)} in the list alone."
            )

    def _check_masks(self) -> None:
        if len(self.masks) != len(self.segments):
            raise SampleError(f"{self.file_name}: {len(self.segments)} segments have {len(self.masks)} masks.")
        for mask in self.masks:
            self._check_size(mask["size"])

    def has_object(self) -> bool:
        """Whether there is a segment with pixels that is no crowd."""
        shown = [index for index, segment in enumerate(self.segments) if not segment["iscrowd"]]
        if self.masks is None:
            return bool(shown)
        from pycocotools import mask as coco_mask  # optional: only instance data needs it

        return any(coco_mask.area(self.masks[index]) for index in shown)

    def packed_masks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The objects to train on: all segments but crowds, which become void, and those without a pixel.

        Returns:
            planes `(ceil((objects + 1) / 8), height, width)` uint8, see `packed_masks.py`, and the objects' classes
            `(objects,)` int64.

        Raises:
            SampleError: the planes would be larger than `LARGEST_PLANES`.
        """
        size = number_of_planes(len(self.segments)) * self.image.height * self.image.width
        if size > LARGEST_PLANES:
            raise SampleError(
                f"{self.file_name}: {len(self.segments)} objects on {self.image.height} x {self.image.width} pixels "
                f"need {size / 2**30:.0f} GB; make the image smaller, or cut it into tiles."
            )
        return self._pack_masks() if self.segment_map is None else self._pack_segment_map()

    def _pack_segment_map(self) -> tuple[torch.Tensor, torch.Tensor]:
        objects = [segment for segment in self.segments if not segment["iscrowd"]]
        void = np.isin(self.segment_map, [VOID_ID, *(segment["id"] for segment in self.segments if segment["iscrowd"])])
        ids = [segment["id"] for segment in objects]
        return pack_segment_map(torch.from_numpy(self.segment_map), ids, torch.from_numpy(void)), _labels_of(objects)

    def _pack_masks(self) -> tuple[torch.Tensor, torch.Tensor]:
        from pycocotools import mask as coco_mask  # optional: only instance data needs it

        # one by one: for lists of more than 255 the library's type of sizes overflows
        visible = [index for index, mask in enumerate(self.masks) if coco_mask.area(mask)]
        objects = [index for index in visible if not self.segments[index]["iscrowd"]]
        crowds = [self.masks[index] for index in visible if self.segments[index]["iscrowd"]]
        planes = np.zeros((number_of_planes(len(objects)), self.image.height, self.image.width), dtype=np.uint8)
        for position, index in enumerate(objects, start=1):
            planes[position // 8] |= coco_mask.decode(self.masks[index]) << (position % 8)
        if crowds:  # an object in front of a crowd is known all the same
            planes[0] |= coco_mask.decode(coco_mask.merge(crowds)) & ~planes.any(axis=0)
        return torch.from_numpy(planes), _labels_of([self.segments[index] for index in objects])

    def label_map(self, void: int = 255) -> np.ndarray:
        """The class of each pixel, of crowds as of others: `(height, width)` int32 with label ids, and `void` in void.

        Raises:
            ValueError: the sample has masks, which may overlap.
        """
        if self.segment_map is None:
            raise ValueError(f"{self.file_name} has masks that may overlap, so there is no single label per pixel.")
        ids = np.array([VOID_ID, *(segment["id"] for segment in self.segments)])
        labels = np.array([void, *(segment["label_id"] for segment in self.segments)], dtype=np.int32)
        order = np.argsort(ids)
        return labels[order][np.searchsorted(ids[order], self.segment_map)]


def check_size(size: Sequence[int], image_size: tuple[int, int], name: str) -> None:
    """
    Args:
        size: (height, width) of an annotation.
        image_size: (height, width) of the image as it was read.
        name: of the image, for messages.

    Raises:
        SampleError: they differ.
    """
    if tuple(size) == tuple(image_size):
        return
    message = f"{name}: the image is {_times(image_size)} (height x width), its annotation {_times(size)}"
    if tuple(size) == tuple(image_size)[::-1]:
        message += "; if the image has an EXIF tag that turns it, either turn the annotation, too, or remove the tag"
    raise SampleError(f"{message}.")


def _labels_of(segments: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([segment["label_id"] for segment in segments], dtype=torch.int64)


def distinct_values(values: np.ndarray) -> np.ndarray:
    """The sorted values of a map, as `np.unique`; fast for maps of regions, since equal neighbours are merged first."""
    flat = values.ravel()
    if flat.size == 0:
        return flat
    starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    return np.unique(flat[np.concatenate(([0], starts))])


def _times(size: Any) -> str:
    return " x ".join(str(length) for length in size)
