"""Pictures and id maps from files, checked: what most data sets need to make a `Sample`."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from proscale_hf.data.sample import SampleError, distinct_values
from proscale_hf.files.reading import FileError
from proscale_hf.files.text import few, shown
from proscale_hf.processing.picture_files import opened_picture
from proscale_hf.processing.pictures import load_image
from proscale_hf.processing.segment_ids import VOID_ID


VALUE_MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # Pillow's single-channel pictures of whole numbers
COLOR_MODES = ("RGB", "RGBA")
VOID_VALUES = (0, 255)
NOT_IN_NAMES = re.compile("[\0-\x1f\x7f\ud800-\udfff]")  # of files: control characters, and what is no text
LONGEST_NAME = 255  # characters of the name of a file or folder


def path_inside(folder: str | Path, name: str) -> Path:
    """The path of a file that an annotation file names.

    Args:
        folder: where the file must be.
        name: a relative name, with `/` between folders.

    Raises:
        ValueError: the name leads out of the folder.
    """
    path = PurePosixPath(name if isinstance(name, str) else "")
    parts = path.parts
    leads_out = not parts or path.is_absolute() or ".." in parts or "\\" in name or ":" in parts[0]
    if leads_out or NOT_IN_NAMES.search(name) or max(map(len, parts)) > LONGEST_NAME:
        raise ValueError(f"{shown(name)} is not the name of a file inside {folder}.")
    return Path(folder, *parts)


def read_image(path: str | Path | bytes, name: str | None = None) -> Image.Image:
    """A picture as upright 8-bit RGB, see `load_image`.

    Args:
        path: an image file, or its content.
        name: what messages call it; by default the path.

    Raises:
        SampleError: it cannot be read.
    """
    try:
        return load_image(path, name)
    except ValueError as error:
        raise SampleError(str(error)) from error


def read_value_map(path: str | Path) -> np.ndarray:
    """A single-channel picture (8 or 16 bits, or the indices of a palette) as `(height, width)` int32 values.

    Raises:
        SampleError: it cannot be read, or has colours.
    """
    return values_of(open_map(path), str(path))


def read_color_map(path: str | Path) -> np.ndarray:
    """A COCO-panoptic picture as `(height, width)` int32 ids: red + 256 green + 256^2 blue.

    Raises:
        SampleError: it cannot be read, or has no colours.
    """
    return color_ids_of(open_map(path), str(path))


def values_of(picture: Image.Image, name: str) -> np.ndarray:
    """As `read_value_map`, of a picture that is open."""
    if picture.mode not in VALUE_MODES:
        raise SampleError(f"{name} must have one channel, whose values are ids, but its mode is {picture.mode}.")
    return np.asarray(picture).astype(np.int32)


def color_ids_of(picture: Image.Image, name: str) -> np.ndarray:
    """As `read_color_map`, of a picture that is open."""
    if picture.mode not in COLOR_MODES:
        raise SampleError(f"{name} must be an RGB picture, whose colours are ids, but its mode is {picture.mode}.")
    codes = np.asarray(picture.convert("RGBA")).view("<u4")[..., 0]  # (height, width), opacity highest
    return (codes & 0xFFFFFF).astype(np.int32)


def open_map(path: str | Path | bytes, name: str | None = None, upright: bool = False) -> Image.Image:
    """A picture of ids as it is in the file.

    Args:
        path: an image file, or its content.
        name: what messages call it; by default the path.
        upright: turn it as an EXIF orientation says.

    Raises:
        SampleError: it cannot be read.
    """
    try:
        with opened_picture(path, name, holds_ids=True) as picture:
            return ImageOps.exif_transpose(picture) if upright else picture
    except FileError as error:
        raise SampleError(str(error)) from error


def shown_segments(segments: list[dict[str, Any]], segment_map: np.ndarray) -> list[dict[str, Any]]:
    """The segments of a list that have pixels in its map.

    Lists of COCO-panoptic files may have others: ADE20K's, as Mask2Former prepares it, have stuff that is hidden behind
    objects. A map that shows none of its segments belongs to another list, so then they stay, for `Sample` to refuse.
    """
    ids = set(distinct_values(segment_map).tolist())
    return [segment for segment in segments if segment["id"] in ids] or segments


def label_finder(
    categories: Sequence[Mapping[str, Any]],
    void: int | Iterable[int] | None = None,
    category_of: Callable[[int], int] = lambda value: value,
) -> Callable[[int], int | None]:
    """What `segments_from_values` asks for the label of a value.

    Args:
        categories: of the data set, in label order.
        void: values that mean nobody knows. Default: of 0 and 255 those that stand for no category.
        category_of: the id of the category that a value stands for.

    Raises:
        ValueError: `void` is no number or numbers.
    """
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    if void is None:
        void = [value for value in VOID_VALUES if category_of(value) not in label_of]
    void = [void] if isinstance(void, int) else list(void)
    if not all(type(value) is int for value in void):  # True is an int, too
        raise ValueError(f"void must be one or more whole numbers, got {void}.")
    return lambda value: None if value in void else label_of[category_of(value)]


def segments_from_values(
    values: np.ndarray, label_of: Callable[[int], int | None], file_name: str
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Segments of a map in which equal values are one segment.

    Args:
        values: `(height, width)` whole numbers.
        label_of: the label id of a value, `None` for void; raises a KeyError for a value that has no meaning.
        file_name: the map's file, for messages.

    Returns:
        `segment_map` and `segments` of a `Sample`; ids count from 1 in the order of values.

    Raises:
        SampleError: naming the values that have no meaning.
    """
    present = distinct_values(values)
    labels, unknown = {}, []
    for value in present.tolist():
        try:
            labels[value] = label_of(value)
        except KeyError:
            unknown.append(value)
    if unknown:
        raise SampleError(f"{file_name}: values {few(unknown)} stand for no category.")
    kept = [value for value, label in labels.items() if label is not None]
    ids = np.full(len(present), VOID_ID, dtype=np.int32)
    ids[np.isin(present, kept)] = np.arange(1, len(kept) + 1)
    segments = [{"id": number, "label_id": labels[value], "iscrowd": 0} for number, value in enumerate(kept, start=1)]
    return ids[np.searchsorted(present, values)], segments
