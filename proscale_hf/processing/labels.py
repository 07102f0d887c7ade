"""Training labels: annotations in, binary masks and their classes out. One numpy function per input form.

A label mask is uint8: 1 = object, 0 = not, `VOID` = nobody knows, which counts neither way in matching and
losses. Maps are resized by nearest neighbour before masks are made of them, so nothing of (masks, height,
width) floats is ever held.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


VOID = 255  # in label masks; the default of `ProScaleMask2FormerConfig.ignore_value`
Size = tuple[int, int]
Labels = tuple[np.ndarray, np.ndarray]


def make_labels(
    segmentation_maps: Any,
    instance_id_to_semantic_id: Any,
    class_labels: Any,
    segments_info: Any,
    *,
    original_sizes: list[Size],
    sizes: list[Size],
    ignore_index: int | None,
    **options: Any,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """
    Labels of a batch. Which of the three forms the maps have is told by what comes along with them.

    Args:
        segmentation_maps, instance_id_to_semantic_id, class_labels, segments_info: see the image processors'
            `preprocess`. Not more than one of the last three.
        original_sizes: (height, width) of each image before resizing, which its map must have too.
        sizes: (height, width) of each image after resizing.
        ignore_index: id of void pixels in maps of ids.
        options: what all three forms take, see [`labels_from_id_map`].

    Returns:
        for each image its masks and classes, see [`labels_from_id_map`].

    Raises:
        ValueError: one line that names the map, sizes, ids or classes at fault.
    """
    companions = {
        "instance_id_to_semantic_id": instance_id_to_semantic_id,
        "class_labels": class_labels,
        "segments_info": segments_info,
    }
    given = [name for name, value in companions.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"give one of {' and '.join(f'`{name}`' for name in given)} with `segmentation_maps`")

    count = len(sizes)
    map_dimensions = 3 if class_labels is not None or segments_info is not None else 2
    if not isinstance(segmentation_maps, list | tuple):
        batched = getattr(segmentation_maps, "ndim", 0) > map_dimensions and len(segmentation_maps) == count
        segmentation_maps = list(segmentation_maps) if batched else [segmentation_maps]
    maps = [_integer_array(item) for item in segmentation_maps]
    if len(maps) != count:
        raise ValueError(f"got {count} images, but {len(maps)} segmentation maps")
    for index, (item, original) in enumerate(zip(maps, original_sizes, strict=True)):
        _check_map(item, original, class_labels is not None, segments_info is not None, index)

    results = []
    mappings = instance_id_to_semantic_id
    if not isinstance(mappings, list | tuple):
        mappings = [mappings] * count
    annotations = _one_per_image(class_labels if class_labels is not None else segments_info, count)
    for item, mapping, annotation, size in zip(
        maps, _counted(mappings, count), _counted(annotations, count), sizes, strict=True
    ):
        if class_labels is not None:
            labels = labels_from_instance_masks(item, annotation, size=size, **options)
        elif segments_info is not None:
            labels = labels_from_coco_panoptic(item, annotation, size=size, **options)
        else:
            labels = labels_from_id_map(item, mapping, size=size, ignore_index=ignore_index, **options)
        results.append(labels)
    return results


def labels_from_id_map(
    id_map: np.ndarray,
    instance_id_to_semantic_id: Mapping[int, int] | None,
    *,
    size: Size,
    padded_size: Size,
    ignore_index: int | None,
    do_reduce_labels: bool,
    num_labels: int | None,
) -> Labels:
    """
    Labels from a map of instance ids, or of class ids where there is no mapping.

    Args:
        id_map (integer array of shape `(height, width)`): pixels of `ignore_index` are void.
        instance_id_to_semantic_id: class of each id in the map; `None`: each id is its class.
        size: (height, width) the image was resized to.
        padded_size: (height, width) of the padded batch; masks are 0 in the padding.
        ignore_index: id of void pixels, `None` for none.
        do_reduce_labels: class 0 means background, and classes count from 1: they are shifted down by one. In
            a map of classes, background then is void (nobody says what is there). With a mapping it is plain
            background, where no object is: a negative for all masks.
        num_labels: number of classes, to check against; `None`: no check.

    Returns:
        uint8 masks (objects, padded height, padded width) with values 0, 1 and `VOID`, and their int64
        classes.

    Raises:
        ValueError: naming ids that are not in the mapping, or classes that are out of range.
    """
    ids = [int(value) for value in np.unique(id_map) if value != ignore_index]
    void_ids = [] if ignore_index is None else [ignore_index]
    if instance_id_to_semantic_id is None:
        classes = {label: label for label in ids}
        if do_reduce_labels:
            void_ids.append(0)
    else:
        classes = {int(key): int(label) for key, label in instance_id_to_semantic_id.items()}
        if do_reduce_labels:
            classes.setdefault(0, 0)
        unknown = [value for value in ids if value not in classes]
        if unknown:
            raise ValueError(f"ids {_few(unknown)} of a segmentation map are not in its `instance_id_to_semantic_id`")
        classes = {value: classes[value] for value in ids}
    classes = _checked_classes(classes, do_reduce_labels, num_labels)
    id_map = resize_nearest(id_map, size)
    return _labels_of_ids(id_map, classes, np.isin(id_map, void_ids), padded_size)


def labels_from_coco_panoptic(
    panoptic_map: np.ndarray,
    segments_info: Sequence[Mapping],
    *,
    size: Size,
    padded_size: Size,
    do_reduce_labels: bool,
    num_labels: int | None,
) -> Labels:
    """
    Labels from a COCO-panoptic picture, whose ids are `R + 256 * G + 256**2 * B`. Id 0 and crowds are void.

    Args:
        panoptic_map (uint8 array of shape `(height, width, 3)`).
        segments_info: for each segment a dict with `"id"`, `"category_id"` (the class) and optionally
            `"iscrowd"`.
        Others: as for [`labels_from_id_map`] with a mapping.

    Returns:
        as [`labels_from_id_map`].

    Raises:
        ValueError: naming ids that are not in `segments_info`, or classes that are out of range.
    """
    missing = [segment for segment in segments_info if not {"id", "category_id"} <= segment.keys()]
    if missing:
        raise ValueError(f'each dict of `segments_info` needs "id" and "category_id", got {missing[0]}')
    red, green, blue = np.moveaxis(panoptic_map.astype(np.int32), -1, 0)
    id_map = red + 256 * green + 256**2 * blue
    void_ids = [0, *(segment["id"] for segment in segments_info if segment.get("iscrowd"))]
    classes = {
        int(segment["id"]): int(segment["category_id"]) for segment in segments_info if segment["id"] not in void_ids
    }
    unknown = sorted({*np.unique(id_map).tolist()} - {*classes, *void_ids})
    if unknown:
        raise ValueError(f"ids {_few(unknown)} of a panoptic map are not in its `segments_info`")
    classes = _checked_classes(classes, do_reduce_labels, num_labels)
    id_map = resize_nearest(id_map, size)
    return _labels_of_ids(id_map, classes, np.isin(id_map, void_ids), padded_size)


def labels_from_instance_masks(
    instance_masks: np.ndarray,
    class_labels: Sequence[int],
    *,
    size: Size,
    padded_size: Size,
    do_reduce_labels: bool,
    num_labels: int | None,
) -> Labels:
    """
    Labels from one mask per object. Masks may overlap, and stay as they are. There is no void.

    Args:
        instance_masks (array of shape `(objects, height, width)`): 0 and 1, or bool.
        class_labels: class of each mask.
        Others: as for [`labels_from_id_map`] with a mapping.

    Returns:
        as [`labels_from_id_map`]. Masks that lose all pixels in resizing are left out.

    Raises:
        ValueError: for other values in the masks, another number of classes, or classes that are out of
            range.
    """
    if len(instance_masks) != len(class_labels):
        raise ValueError(f"got {len(instance_masks)} instance masks, but {len(class_labels)} `class_labels` for them")
    if instance_masks.size and not (instance_masks.min() >= 0 and instance_masks.max() <= 1):
        raise ValueError(f"instance masks must hold 0 and 1 only, got values up to {instance_masks.max()}")
    classes = {index: int(label) for index, label in enumerate(class_labels)}
    classes = _checked_classes(classes, do_reduce_labels, num_labels)
    resized = {index: resize_nearest(instance_masks[index], size) for index in classes}
    kept = [index for index, mask in resized.items() if mask.any()]
    masks = np.zeros((len(kept), *padded_size), dtype=np.uint8)
    for mask, index in zip(masks, kept, strict=True):
        mask[: size[0], : size[1]] = resized[index]
    return masks, np.array([classes[index] for index in kept], dtype=np.int64)


def resize_nearest(image: np.ndarray, size: Size) -> np.ndarray:
    """Resize (height, width) to `size`: each new pixel takes the value of the old pixel under its centre."""
    if image.shape == size:
        return image
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(np.int64).clip(max=old - 1)
        for old, new in zip(image.shape, size, strict=True)
    )
    return image[rows[:, None], columns]


def _labels_of_ids(id_map: np.ndarray, classes: Mapping[int, int], void: np.ndarray, padded_size: Size) -> Labels:
    present = set(np.unique(id_map[~void]).tolist())
    ids = [value for value in sorted(classes) if value in present]
    masks = np.zeros((len(ids), *padded_size), dtype=np.uint8)
    height, width = id_map.shape
    for mask, value in zip(masks[:, :height, :width], ids, strict=True):
        np.equal(id_map, value, out=mask, casting="unsafe")
        mask[void] = VOID
    return masks, np.array([classes[value] for value in ids], dtype=np.int64)


def _checked_classes(classes: Mapping[int, int], do_reduce_labels: bool, num_labels: int | None) -> dict[int, int]:
    """Leave out background (class 0 with `do_reduce_labels`), shift the others, and check their range."""
    if do_reduce_labels:
        classes = {key: label - 1 for key, label in classes.items() if label != 0}
    limit = num_labels if num_labels is not None else float("inf")
    wrong = sorted({label for label in classes.values() if not 0 <= label < limit})
    if wrong:
        allowed = "at least 0" if num_labels is None else f"0 to {num_labels - 1}"
        after = " after `do_reduce_labels`" if do_reduce_labels else ""
        raise ValueError(f"class labels {_few(wrong)} are out of range{after}: they must be {allowed}")
    return dict(classes)


def _few(values: Sequence[int]) -> str:
    shown = ", ".join(str(value) for value in values[:10])
    return f"[{shown}, ...]" if len(values) > 10 else f"[{shown}]"


def _check_map(array: np.ndarray, image_size: Size, is_masks: bool, is_coco: bool, index: int) -> None:
    name = f"segmentation map {index}"
    if is_masks:
        form, map_size, fits = "(objects, height, width)", array.shape[1:], array.ndim == 3
    elif is_coco:
        form, map_size, fits = "(height, width, 3)", array.shape[:2], array.ndim == 3 and array.shape[2] == 3
    else:
        form, map_size, fits = "(height, width)", array.shape, array.ndim == 2
    if not fits:
        hint = "" if is_masks or is_coco else "; masks need `class_labels`, COCO-panoptic pictures `segments_info`"
        raise ValueError(f"{name} has shape {array.shape}, expected {form}{hint}")
    if tuple(map_size) != tuple(image_size):
        raise ValueError(f"{name} is {map_size[0]} x {map_size[1]}, but its image is {image_size[0]} x {image_size[1]}")


def _integer_array(values: Any) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype.kind == "f" and (array == array.round()).all():
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"segmentation maps must hold integers, got {array.dtype}")
    return array


def _one_per_image(annotations: Any, count: int) -> Sequence:
    """Put the classes or segments of a single image into a list, if the caller has not."""
    if annotations is None:
        return [None] * count
    first = annotations[0] if len(annotations) else None
    if first is None or isinstance(first, Mapping) or np.ndim(first) == 0:
        return [annotations] if count == 1 else annotations
    return annotations


def _counted(items: Sequence, count: int) -> Sequence:
    if len(items) != count:
        raise ValueError(f"got {count} images, but {len(items)} sets of classes for their segmentation maps")
    return items
