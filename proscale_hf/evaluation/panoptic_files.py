"""Panoptic quality of a prediction that lies in files, in COCO-panoptic format: a JSON file and a folder of PNG files.

Nothing here imports torch: most of the time of a small set would be its import.
"""

import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from proscale_hf.evaluation.panoptic_quality import PanopticQuality
from proscale_hf.files.text import few
from proscale_hf.processing.picture_files import opened_picture


IMAGES_AT_A_TIME = 16  # of a process


def panoptic_quality_of_files(
    ground_truth_json: Path,
    ground_truth_folder: Path,
    prediction_json: Path,
    prediction_folder: Path,
    processes: int | None = None,
) -> dict[str, Any]:
    """What `PanopticQuality.compute` gives for the files; see `evaluate_files`."""
    files = (ground_truth_json, ground_truth_folder, prediction_json, prediction_folder)
    return evaluate_files(*files, processes)["panoptic"]


def evaluate_files(
    ground_truth_json: Path,
    ground_truth_folder: Path,
    prediction_json: Path,
    prediction_folder: Path,
    processes: int | None = None,
) -> dict[str, Any]:
    """Measure a prediction against the ground truth, both in COCO-panoptic format.

    Predictions of images that the ground truth does not list are ignored. An image that it lists twice counts twice.

    Args:
        ground_truth_json, prediction_json: COCO-panoptic JSON files; the ground truth's lists the categories.
        ground_truth_folder, prediction_folder: their folders of PNG files, with ids in base 256 (red lowest).
        processes: how many share the work; default: one per core. The result does not depend on it.

    Returns:
        The results as `evaluator.evaluate` gives them, with "panoptic" alone, and "categories", those of the ground
        truth with "id", "name" (the id where the file has no name) and "isthing".

    Raises:
        ValueError: a file is missing or damaged, there are no images, an image has no prediction, or a prediction is
            not what `PanopticQuality.update` takes. The message names the file or the image.
    """
    start = time.perf_counter()
    ground_truth, prediction = read_json(ground_truth_json), read_json(prediction_json)
    with coco_panoptic_format(ground_truth_json):
        is_thing = {category["id"]: category["isthing"] == 1 for category in ground_truth["categories"]}
        names = {category["id"]: category.get("name", category["id"]) for category in ground_truth["categories"]}
        truths = [(annotation["image_id"], annotation) for annotation in ground_truth["annotations"]]
    with coco_panoptic_format(prediction_json):
        prediction_of = {annotation["image_id"]: annotation for annotation in prediction["annotations"]}
    if not truths:
        raise ValueError(f"{ground_truth_json} has no annotations, so there is nothing to measure.")
    if missing := {image_id for image_id, _ in truths if image_id not in prediction_of}:
        raise ValueError(f"there is no prediction for the images with ids {few(missing)}.")
    pairs = [(truth, prediction_of[image_id]) for image_id, truth in truths]
    portions = [pairs[start : start + IMAGES_AT_A_TIME] for start in range(0, len(pairs), IMAGES_AT_A_TIME)]
    count = partial(count_images, is_thing, Path(ground_truth_folder), Path(prediction_folder))
    measure = make_measure(is_thing)
    for state in map_in_processes(count, portions, processes or os.cpu_count()):
        measure.merge(state)
    seconds = time.perf_counter() - start
    return {
        "panoptic": measure.compute(),
        "images": len(pairs),
        "skipped": [],
        "seconds": seconds,
        "images_per_second": len(pairs) / seconds,
        "categories": [
            {"id": category_id, "name": str(name), "isthing": int(is_thing[category_id])}
            for category_id, name in names.items()
        ],
    }


def make_measure(is_thing: Mapping[int, bool]) -> PanopticQuality:
    things = [category for category in is_thing if is_thing[category]]
    return PanopticQuality(things, is_thing.keys() - things)


def map_in_processes(function: Callable, items: Sequence, processes: int) -> Iterator:
    """`map`, by several processes if there is enough to do.

    Raises:
        ValueError: a process was killed.
    """
    processes = min(processes, len(items))
    if processes < 2:
        yield from map(function, items)
        return
    # Forked processes do not import everything again, which takes longer than a thousand images.
    start_method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with ProcessPoolExecutor(processes, multiprocessing.get_context(start_method), keep_freed_memory) as pool:
        try:
            yield from pool.map(function, items)
        except BrokenProcessPool as error:
            raise ValueError("a process was killed, probably for want of memory; let fewer share the work.") from error


def keep_freed_memory() -> None:
    """Free a large piece of memory once: afterwards glibc keeps what is freed, which saves a fifth of the time."""
    np.empty(16 * 1024**2, dtype=np.uint8)


def count_images(
    is_thing: Mapping[int, bool],
    ground_truth_folder: Path,
    prediction_folder: Path,
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> dict[str, Any]:
    """The `state` of a measure that has counted some images, given their true and predicted annotations."""
    measure = make_measure(is_thing)
    for truth, prediction in pairs:
        try:
            with coco_panoptic_format("its annotation"):
                measure.update(
                    read_colors(prediction_folder, prediction["file_name"]),
                    prediction["segments_info"],
                    read_colors(ground_truth_folder, truth["file_name"]),
                    truth["segments_info"],
                )
        except ValueError as error:
            raise ValueError(f"image {truth['image_id']}: {error}") from error
    return measure.state()


@contextlib.contextmanager
def coco_panoptic_format(name: str | Path) -> Iterator[None]:
    """Turns the error of a missing entry, or of one of another type, into a ValueError that says so."""
    try:
        yield
    except (KeyError, TypeError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{name} is not in the COCO-panoptic format: {reason}.") from error


def read_colors(folder: Path, file_name: str) -> np.ndarray:
    """A COCO-panoptic PNG as `(height, width, 3)` uint8.

    Raises:
        ValueError: the file is missing or damaged, has no colours, or lies outside the folder.
    """
    name = PurePosixPath(file_name)
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{file_name!r} is not the name of a file inside {folder}.")
    path = folder / name
    with opened_picture(path, holds_ids=True) as picture:
        pass
    if picture.mode not in ("RGB", "RGBA"):
        raise ValueError(f"{path} must be an RGB picture, whose colours are ids, but its mode is {picture.mode}.")
    return np.asarray(picture)[..., :3]


def read_json(path: Path) -> Any:
    """
    Raises:
        ValueError: the file cannot be read, or is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}.") from error
