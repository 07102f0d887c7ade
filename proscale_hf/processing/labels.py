"""Training labels: annotations in, binary masks and their classes out. One numpy function for each form of annotations.

A label mask is uint8: 1 = object, 0 = not, `VOID_VALUE` = unknown. Matching and losses leave void pixels out. Maps are
resized by nearest neighbour before masks are made of them, so there is never a float for each mask and pixel.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from proscale_hf.files.text import few, shown
from proscale_hf.processing.packed_masks import VOID_VALUE
from proscale_hf.processing.segment_ids import crowd_flag
from proscale_hf.processing.sizes import ImageSizes, Size


Labels = tuple[np.ndarray, np.ndarray]  # masks and classes


@dataclass(frozen=True)
class Annotations:
    """
    The annotations of a batch, as they are given to an image processor's `preprocess`, which explains them.

    At most one of the last three is given. It says which form the maps have.
    """

    segmentation_maps: Any
    instance_id_to_semantic_id: Any = None
    class_labels: Any = None
    segments_info: Any = None

    @property
    def companion(self) -> str | None:
        """The name of the one that comes along with the maps.

        Raises:
            ValueError: there are several.
        """
        given = [name for name in FORMS if name is not None and getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(f'`{name}`' for name in given)} with `segmentation_maps`")
        return given[0] if given else None


@dataclass(frozen=True)
class LabelRules:
    """
    What ids and classes mean.

    Args:
        ignore_index: id of void pixels in maps of ids, `None` for none.
        do_reduce_labels: class 0 means background, and the others are shifted down by one. In a map of classes
            background then is void. With instances it is the place without objects: a negative for all masks.
        num_labels: number of classes, to check against; `None`: no check.
    """

    ignore_index: int | None = 255
    do_reduce_labels: bool = False
    num_labels: int | None = None


def make_labels(annotations: Annotations, sizes: list[ImageSizes], rules: LabelRules) -> list[Labels]:
    """
    Labels of a batch.

    Args:
        annotations: of all its images. Maps have the sizes that the images had before resizing.
        sizes: of the images.
        rules: what ids and classes mean.

    Returns:
        for each image uint8 masks (objects, padded height, padded width) with values 0, 1 and `VOID_VALUE`, 0 in the
        padding, and their int64 classes.

    Raises:
        ValueError: one line that names the map, sizes, ids or classes at fault.
    """
    companion = annotations.companion
    form = FORMS[companion]
    maps = _one_map_per_image(annotations.segmentation_maps, form, len(sizes))
    for index, (item, image) in enumerate(zip(maps, sizes, strict=True)):
        form.check(item, image.original, index)
    companions = None if companion is None else getattr(annotations, companion)
    companions = form.one_per_image(companions, len(sizes))
    if len(companions) != len(sizes):
        raise ValueError(f"got {len(sizes)} images, but {len(companions)} sets of classes for their segmentation maps")
    return [form.labels(*given, rules) for given in zip(maps, companions, sizes, strict=True)]


def labels_from_id_map(
    id_map: np.ndarray, instance_id_to_semantic_id: Mapping[int, int] | None, sizes: ImageSizes, rules: LabelRules
) -> Labels:
    """
    Labels from a map of instance ids, or of class ids where there is no mapping.

    Args:
        id_map (integer array of shape `(height, width)`): pixels of `rules.ignore_index` are void.
        instance_id_to_semantic_id: class of each id in the map; `None`: each id is its class.
        sizes, rules: see [`make_labels`].

    Returns:
        masks and classes, see [`make_labels`].

    Raises:
        ValueError: naming ids that are not in the mapping, or classes that are out of range.
    """
    ids = [int(value) for value in np.unique(id_map) if value != rules.ignore_index]
    void_ids = [] if rules.ignore_index is None else [rules.ignore_index]
    if instance_id_to_semantic_id is None:
        classes = {label: label for label in ids}
        if rules.do_reduce_labels:
            void_ids.append(0)
    else:
        classes = {
            whole_number(key, "id"): whole_number(label, "class") for key, label in instance_id_to_semantic_id.items()
        }
        if rules.do_reduce_labels:
            classes.setdefault(0, 0)
        unknown = [value for value in ids if value not in classes]
        if unknown:
            raise ValueError(f"ids {few(unknown)} of a segmentation map are not in its `instance_id_to_semantic_id`")
        classes = {value: classes[value] for value in ids}
    return _labels_of_ids(id_map, _checked_classes(classes, rules), void_ids, sizes)


def labels_from_coco_panoptic(
    panoptic_map: np.ndarray, segments_info: Sequence[Mapping], sizes: ImageSizes, rules: LabelRules
) -> Labels:
    """
    Labels from a COCO-panoptic picture, whose ids are `R + 256 * G + 256**2 * B`. Id 0 and crowds are void.

    Args:
        panoptic_map (uint8 array of shape `(height, width, 3)`).
        segments_info: for each segment a dict with `"id"`, `"category_id"` (the class) and optionally
            `"iscrowd"`.
        sizes, rules: see [`make_labels`].

    Returns:
        masks and classes, see [`make_labels`].

    Raises:
        ValueError: naming ids that are not in `segments_info`, or classes that are out of range.
    """
    missing = [segment for segment in segments_info if not {"id", "category_id"} <= segment.keys()]
    if missing:
        raise ValueError(f'each dict of `segments_info` needs "id" and "category_id", got {shown(missing[0])}')
    red, green, blue = np.moveaxis(panoptic_map.astype(np.int32), -1, 0)
    id_map = red + 256 * green + 256**2 * blue
    ids = [whole_number(segment["id"], "id") for segment in segments_info]
    crowds = [id_ for id_, segment in zip(ids, segments_info, strict=True) if crowd_flag(segment.get("iscrowd", 0))]
    void_ids = [0, *crowds]
    classes = {
        id_: whole_number(segment["category_id"], "category_id")
        for id_, segment in zip(ids, segments_info, strict=True)
        if id_ not in void_ids
    }
    unknown = sorted({*np.unique(id_map).tolist()} - {*classes, *void_ids})
    if unknown:
        raise ValueError(f"ids {few(unknown)} of a panoptic map are not in its `segments_info`")
    return _labels_of_ids(id_map, _checked_classes(classes, rules), void_ids, sizes)


def labels_from_instance_masks(
    instance_masks: np.ndarray, class_labels: Sequence[int], sizes: ImageSizes, rules: LabelRules
) -> Labels:
    """
    Labels from one mask per object. Masks may overlap, and there is no void.

    Args:
        instance_masks (array of shape `(objects, height, width)`): 0 and 1, or bool.
        class_labels: class of each mask.
        sizes, rules: see [`make_labels`].

    Returns:
        masks and classes, see [`make_labels`]. Masks that lose all pixels in resizing are left out.

    Raises:
        ValueError: for other values in the masks, another number of classes, or classes that are out of
            range.
    """
    if len(instance_masks) != len(class_labels):
        raise ValueError(f"got {len(instance_masks)} instance masks, but {len(class_labels)} `class_labels` for them")
    if instance_masks.size and not (instance_masks.min() >= 0 and instance_masks.max() <= 1):
        raise ValueError(f"instance masks must hold 0 and 1 only, got values up to {instance_masks.max()}")
    labels = {index: whole_number(label, "class_labels") for index, label in enumerate(class_labels)}
    classes = _checked_classes(labels, rules)
    resized = {index: resize_nearest(instance_masks[index], sizes.resized) for index in classes}
    kept = [index for index, mask in resized.items() if mask.any()]
    height, width = sizes.resized
    masks = np.zeros((len(kept), *sizes.padded), dtype=np.uint8)
    for mask, index in zip(masks, kept, strict=True):
        mask[:height, :width] = resized[index]
    return masks, np.array([classes[index] for index in kept], dtype=np.int64)


def whole_number(value: Any, name: str) -> int:
    """An id or a class, which nothing is cut off from.

    Raises:
        ValueError: it is no whole number; the message says its `name`.
    """
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number != value:
        raise ValueError(f"`{name}` must be a whole number, got {shown(value)}")
    return number


def resize_nearest(image: np.ndarray, size: Size) -> np.ndarray:
    """Resize (height, width) to `size`: each new pixel takes the value of the old pixel under its centre."""
    if image.shape == size:
        return image
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(np.int64).clip(max=old - 1)
        for old, new in zip(image.shape, size, strict=True)
    )
    return image[rows[:, None], columns]


def _labels_of_ids(id_map: np.ndarray, classes: Mapping[int, int], void_ids: list[int], sizes: ImageSizes) -> Labels:
    id_map = resize_nearest(id_map, sizes.resized)
    void = np.isin(id_map, void_ids)
    present = set(np.unique(id_map[~void]).tolist())
    ids = [value for value in sorted(classes) if value in present]
    height, width = sizes.resized
    masks = np.zeros((len(ids), *sizes.padded), dtype=np.uint8)
    for mask, value in zip(masks[:, :height, :width], ids, strict=True):
        np.equal(id_map, value, out=mask, casting="unsafe")
        mask[void] = VOID_VALUE
    return masks, np.array([classes[value] for value in ids], dtype=np.int64)


def _checked_classes(classes: Mapping[int, int], rules: LabelRules) -> dict[int, int]:
    """Leave out background (class 0 with `do_reduce_labels`), shift the others, and check their range."""
    if rules.do_reduce_labels:
        classes = {key: label - 1 for key, label in classes.items() if label != 0}
    limit = rules.num_labels if rules.num_labels is not None else float("inf")
    wrong = sorted({label for label in classes.values() if not 0 <= label < limit})
    if wrong:
        allowed = "at least 0" if rules.num_labels is None else f"0 to {rules.num_labels - 1}"
        after = " after `do_reduce_labels`" if rules.do_reduce_labels else ""
        raise ValueError(f"class labels {few(wrong)} are out of range{after}: they must be {allowed}")
    return dict(classes)


@dataclass(frozen=True)
class _Form:
    """One of the three forms of annotations: what its maps look like, and what makes labels of them."""

    shape: str
    dimensions: int
    size_axes: slice  # where height and width stand in a map's shape
    channels: int | None
    labels: Callable[[np.ndarray, Any, ImageSizes, LabelRules], Labels]
    one_per_image: Callable[[Any, int], Sequence]

    def check(self, array: np.ndarray, image_size: Size, index: int) -> None:
        """Refuse a map that has another form, or another size than its image."""
        if array.ndim != self.dimensions or self.channels not in (None, array.shape[-1]):
            hint = "; masks need `class_labels`, COCO-panoptic pictures `segments_info`" if self.dimensions == 2 else ""
            raise ValueError(f"segmentation map {index} has shape {array.shape}, expected {self.shape}{hint}")
        height, width = array.shape[self.size_axes]
        if (height, width) != tuple(image_size):
            raise ValueError(
                f"segmentation map {index} is {height} x {width}, but its image is {image_size[0]} x {image_size[1]}"
            )


def _one_map_per_image(segmentation_maps: Any, form: _Form, count: int) -> list[np.ndarray]:
    if not isinstance(segmentation_maps, list | tuple):
        is_batch = getattr(segmentation_maps, "ndim", 0) > form.dimensions and len(segmentation_maps) == count
        segmentation_maps = list(segmentation_maps) if is_batch else [segmentation_maps]
    if len(segmentation_maps) != count:
        raise ValueError(f"got {count} images, but {len(segmentation_maps)} segmentation maps")
    return [_integer_array(item) for item in segmentation_maps]


def _integer_array(values: Any) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype.kind == "f" and (array == array.round()).all():
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"segmentation maps must hold integers, got {array.dtype}")
    return array


def _mapping_per_image(mappings: Any, count: int) -> Sequence:
    """A mapping for each image, where one was given for all."""
    return mappings if isinstance(mappings, list | tuple) else [mappings] * count


def _list_per_image(annotations: Any, count: int) -> Sequence:
    """The classes or segments of each image, where those of a single one were given without a list around them."""
    first = annotations[0] if len(annotations) else None
    is_one_image = first is None or isinstance(first, Mapping) or np.ndim(first) == 0
    return [annotations] if is_one_image and count == 1 else annotations


IDS = _Form("(height, width)", 2, slice(0, 2), None, labels_from_id_map, _mapping_per_image)
FORMS = {  # by what comes along with the maps
    None: IDS,
    "instance_id_to_semantic_id": IDS,
    "class_labels": _Form(
        "(objects, height, width)", 3, slice(1, 3), None, labels_from_instance_masks, _list_per_image
    ),
    "segments_info": _Form("(height, width, 3)", 3, slice(0, 2), 3, labels_from_coco_panoptic, _list_per_image),
}
