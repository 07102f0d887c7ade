"""Panoptic quality (PQ), by the rules of COCO-panoptic.

The measure is that of "Panoptic Segmentation" (Kirillov et al., 2019): per category, segments of prediction
and ground truth with an intersection over union (IoU) above 0.5 are matched (there is at most one way to),
and

    SQ = mean IoU of the matches
    RQ = matches / (matches + false positives / 2 + false negatives / 2)
    PQ = SQ * RQ

Void (ground-truth pixels of no segment) does not count into unions, crowd segments are neither found nor
missed, and an unmatched prediction is no false positive if more than half of it is void or a crowd of its own
category. The numbers equal those of the reference implementation, panopticapi.

    python -m proscale_hf.evaluation.panoptic_quality \\
        --gt-json A.json --gt-folder A --pred-json B.json --pred-folder B

prints the result of two COCO-panoptic sets as JSON.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from operator import index
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from proscale_hf.processing.segment_ids import VOID_ID


COUNTS = ("iou_sum", "true_positives", "false_positives", "false_negatives")
IMAGES_AT_A_TIME = 16


class PanopticQuality:
    """Counts matches image by image, and gives PQ, SQ and RQ over all of them.

    Args:
        thing_category_ids: categories counted under "Things".
        stuff_category_ids: categories counted under "Stuff".
        void_id: value of map pixels that belong to no segment, in prediction and ground truth.

    Raises:
        ValueError: a category is both thing and stuff.
    """

    def __init__(self, thing_category_ids: Iterable[int], stuff_category_ids: Iterable[int], void_id: int = VOID_ID):
        self.thing_category_ids = sorted(set(thing_category_ids))
        self.stuff_category_ids = sorted(set(stuff_category_ids))
        self.void_id = void_id
        if both := set(self.thing_category_ids) & set(self.stuff_category_ids):
            raise ValueError(f"Categories {sorted(both)} are given both as things and as stuff.")
        categories = [*self.thing_category_ids, *self.stuff_category_ids]
        self.iou_sum = dict.fromkeys(categories, 0.0)
        self.true_positives = dict.fromkeys(categories, 0)
        self.false_positives = dict.fromkeys(categories, 0)
        self.false_negatives = dict.fromkeys(categories, 0)

    def update(
        self,
        prediction: np.ndarray,
        prediction_segments: Sequence[Mapping[str, Any]],
        ground_truth: np.ndarray,
        ground_truth_segments: Sequence[Mapping[str, Any]],
    ) -> None:
        """Count one image.

        The prediction is checked. The ground truth is taken as it comes, which is what the reference does: a listed
        segment without pixels is a missed one, pixels of no listed segment are nobody's without being void, and
        categories other than those of this measure do not count.

        Args:
            prediction: `(height, width)` integer map of segment ids, or `(height, width, 3)` uint8 colours as COCO
                writes ids.
            prediction_segments: `{"id", "category_id"}` of each predicted segment.
            ground_truth: the same of the true segments.
            ground_truth_segments: `{"id", "category_id"}` of each true segment, `"iscrowd"` where it is one, `"area"`
                where it is not the number of the segment's pixels.

        Raises:
            ValueError: the maps differ in size, or the prediction's map and segments do not have the same ids, or a
                predicted category is unknown.
        """
        prediction, ground_truth = np.asarray(prediction), np.asarray(ground_truth)
        check_maps(prediction, ground_truth)
        predicted_ids, true_ids, pixels = count_overlaps(prediction, ground_truth)
        predicted = {index(segment["id"]): segment for segment in prediction_segments}
        true = {index(segment["id"]): segment for segment in ground_truth_segments}
        self._check_prediction(prediction_segments, predicted, predicted_ids)

        predicted_categories, true_categories = (
            np.array([index(segment["category_id"]) for segment in segments.values()], dtype=np.int64)
            for segments in (predicted, true)
        )
        is_crowd = np.array([bool(segment.get("iscrowd", 0)) for segment in true.values()], dtype=bool)
        same_category = predicted_categories[:, None] == true_categories  # (predicted, true)

        pixels = np.pad(pixels, (0, 1))  # a last row and column of zeros for ids that have no pixels
        rows, columns = find_positions(predicted_ids, predicted), find_positions(true_ids, true)
        predicted_areas = pixels[rows].sum(axis=1)
        predicted_void = pixels[rows, find_positions(true_ids, [self.void_id])]
        intersections = pixels[np.ix_(rows, columns)]
        counted_areas = pixels[:, columns].sum(axis=0)
        true_areas = np.array(
            [segment.get("area", counted) for segment, counted in zip(true.values(), counted_areas, strict=True)]
        )
        unions = (predicted_areas - predicted_void)[:, None] + true_areas - intersections
        iou = intersections / np.maximum(unions, 1)
        matches = (iou > 0.5) & same_category & ~is_crowd

        # A prediction may lie on void and on a crowd of its category: those pixels cannot be called wrong.
        # The reference keeps one crowd per category and image, the last listed, so this does too.
        last_crowds = {true_categories[column]: column for column in np.flatnonzero(is_crowd)}
        counts_as_crowd = np.isin(np.arange(len(true)), list(last_crowds.values()))
        excusable = predicted_void + (intersections * (same_category & counts_as_crowd)).sum(axis=1)
        is_false_positive = ~matches.any(axis=1) & (excusable <= 0.5 * predicted_areas)
        is_false_negative = ~matches.any(axis=0) & ~is_crowd & np.isin(true_categories, list(self.iou_sum))
        for row, column in zip(*np.nonzero(matches), strict=True):
            self.iou_sum[true_categories[column]] += iou[row, column]
            self.true_positives[true_categories[column]] += 1
        for category in predicted_categories[is_false_positive]:
            self.false_positives[category] += 1
        for category in true_categories[is_false_negative]:
            self.false_negatives[category] += 1

    def _check_prediction(
        self, segments: Sequence[Mapping[str, Any]], by_id: Mapping[int, Mapping[str, Any]], ids_in_map: np.ndarray
    ) -> None:
        in_map = set(ids_in_map.tolist())
        if len(by_id) < len(segments):
            raise ValueError("the prediction's list (JSON) has a segment id twice.")
        if unlisted := in_map - by_id.keys() - {self.void_id}:
            raise ValueError(
                f"segments {few(unlisted)} of the prediction are in its map (PNG), not in its list (JSON)."
            )
        if unseen := by_id.keys() - in_map:
            raise ValueError(f"segments {few(unseen)} of the prediction are in its list (JSON), not in its map (PNG).")
        for segment in segments:
            if segment["category_id"] not in self.iou_sum:
                raise ValueError(
                    f"segment {segment['id']} of the prediction has the unknown category {segment['category_id']}."
                )

    def state(self) -> dict[str, Any]:
        """All that was counted, as plain values that can be sent to another process."""
        return {name: dict(getattr(self, name)) for name in COUNTS}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Count what another `PanopticQuality`, of the same categories, has counted.

        Raises:
            ValueError: it has other categories.
        """
        if state["iou_sum"].keys() != self.iou_sum.keys():
            raise ValueError("Cannot merge counts of other categories.")
        for name in COUNTS:
            for category, value in state[name].items():
                getattr(self, name)[category] += value

    def compute(self) -> dict[str, Any]:
        """PQ, SQ and RQ (each 0..1) so far.

        Returns:
            `{"All": {"pq", "sq", "rq", "n"}, "per_class": {category id as text: {"pq", "sq", "rq"}},
            "Things": ..., "Stuff": ...}`. The groups are means over their `n` categories that occurred, be it
            in ground truth or in prediction; the others are 0 per class.
        """
        categories = [*self.thing_category_ids, *self.stuff_category_ids]
        per_class = {category: self._category_quality(category) for category in sorted(categories)}
        return {
            "All": self._average(per_class, categories),
            "per_class": {str(category): quality for category, quality in per_class.items()},
            "Things": self._average(per_class, self.thing_category_ids),
            "Stuff": self._average(per_class, self.stuff_category_ids),
        }

    def _occurred(self, category: int) -> bool:
        return self.true_positives[category] + self.false_positives[category] + self.false_negatives[category] > 0

    def _category_quality(self, category: int) -> dict[str, float]:
        matches = self.true_positives[category]
        errors = self.false_positives[category] + self.false_negatives[category]
        if matches == 0:
            return {"pq": 0.0, "sq": 0.0, "rq": 0.0}
        segmentation_quality = float(self.iou_sum[category]) / matches
        recognition_quality = matches / (matches + 0.5 * errors)
        return {
            "pq": segmentation_quality * recognition_quality,
            "sq": segmentation_quality,
            "rq": recognition_quality,
        }

    def _average(self, per_class: Mapping[int, Mapping[str, float]], categories: Sequence[int]) -> dict[str, float]:
        occurred = [per_class[category] for category in categories if self._occurred(category)]
        means = {
            measure: sum(quality[measure] for quality in occurred) / max(len(occurred), 1)
            for measure in ("pq", "sq", "rq")
        }
        return {**means, "n": len(occurred)}


def check_maps(prediction: np.ndarray, ground_truth: np.ndarray) -> None:
    """Raises a ValueError unless both are maps of ids, or both maps of colours, of one size."""
    if prediction.shape[:2] != ground_truth.shape[:2]:
        sizes = " and ".join(" x ".join(map(str, each.shape[:2])) for each in (prediction, ground_truth))
        raise ValueError(f"prediction and ground truth must be of one size, but are {sizes} (height x width).")
    if prediction.shape != ground_truth.shape or prediction.shape[2:] not in ((), (3,)):
        raise ValueError(
            "maps must both be (height, width), or both (height, width, 3), but are "
            f"{prediction.shape} and {ground_truth.shape}."
        )


def count_overlaps(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels that the regions of two maps share.

    Regions are long runs of equal neighbours, so runs are counted rather than pixels, and colours become ids only
    where a run ends.

    Args:
        first, second: maps of one shape: `(height, width)` ids, or `(height, width, 3)` colours.

    Returns:
        the sorted ids of either map, and how many pixels each pair of ids has: `(first ids, second ids)` int64.
    """
    channels = 1 if first.ndim == 2 else 3
    first, second = first.reshape(-1), second.reshape(-1)
    is_change = (first[channels:] != first[:-channels]) | (second[channels:] != second[:-channels])
    ends = np.append(np.flatnonzero(is_change), first.size - 1) // channels
    ends = ends[np.diff(ends, prepend=-1) > 0]  # once where several channels change
    lengths = np.diff(ends, prepend=-1)
    first_ids, rows = rank(ids_at(first.reshape(-1, channels), ends))
    second_ids, columns = rank(ids_at(second.reshape(-1, channels), ends))
    shape = (len(first_ids), len(second_ids))
    pixels = np.bincount(rows * len(second_ids) + columns, weights=lengths, minlength=shape[0] * shape[1])
    return first_ids, second_ids, pixels.astype(np.int64).reshape(shape)


def ids_at(pixels: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The segment ids of some of the `(pixels, 1 or 3)` ids or colours."""
    ids, *others = pixels[positions].T.astype(np.int64)
    for place, channel in enumerate(others, start=1):
        ids += 256**place * channel
    return ids


def rank(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values, sorted, and where each value is among them. (`np.unique` takes twice as long for that.)"""
    ordered = np.sort(values)
    distinct = ordered[np.diff(ordered, prepend=ordered[:1] - 1) > 0]
    return distinct, np.searchsorted(distinct, values)


def find_positions(known_ids: np.ndarray, ids: Iterable[int]) -> list[int]:
    """Where each of `ids` is in `known_ids`; -1 if it is not there."""
    position_of = {known: position for position, known in enumerate(known_ids.tolist())}
    return [position_of.get(wanted, -1) for wanted in ids]


def panoptic_quality_of_files(
    ground_truth_json: Path,
    ground_truth_folder: Path,
    prediction_json: Path,
    prediction_folder: Path,
    processes: int | None = None,
) -> dict[str, Any]:
    """Panoptic quality of a prediction in COCO-panoptic format; see `PanopticQuality.compute`.

    Predictions of images that the ground truth does not list are ignored; an image that it lists twice counts twice.

    Args:
        ground_truth_json, prediction_json: COCO-panoptic JSON files; the ground truth's lists the categories.
        ground_truth_folder, prediction_folder: their folders of PNG files, with ids in base 256 (red lowest).
        processes: that share the work; default: one per core. The result does not depend on it.

    Raises:
        ValueError: a file is missing or damaged, there are no images, an image has no prediction, or a prediction is
            not what `PanopticQuality.update` takes. The message names the file or the image.
    """
    ground_truth, prediction = read_json(ground_truth_json), read_json(prediction_json)
    with coco_panoptic_format(ground_truth_json):
        is_thing = {category["id"]: category["isthing"] == 1 for category in ground_truth["categories"]}
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
    return measure.compute()


def make_measure(is_thing: Mapping[int, bool]) -> PanopticQuality:
    things = [category for category in is_thing if is_thing[category]]
    return PanopticQuality(things, is_thing.keys() - things)


def map_in_processes(function: Callable, items: Sequence, processes: int) -> Iterator:
    """`map`, by several processes if there is enough to do."""
    processes = min(processes, len(items))
    if processes < 2:
        yield from map(function, items)
        return
    # Forked processes do not import everything again, which takes longer than a thousand images.
    start_method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with ProcessPoolExecutor(processes, multiprocessing.get_context(start_method), keep_freed_memory) as pool:
        yield from pool.map(function, items)


def keep_freed_memory() -> None:
    """glibc returns freed memory to the system, unless a larger piece was freed before; here that is a fifth of the
    time.
    """
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
    """Turns what goes wrong where entries are missing, or of another type, into a ValueError that says so."""
    try:
        yield
    except (KeyError, TypeError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{name} is not in the COCO-panoptic format: {reason}.") from error


def read_colors(folder: Path, file_name: str) -> np.ndarray:
    """A COCO-panoptic PNG as `(height, width, 3)` uint8.

    Raises:
        ValueError: the file is not there, is damaged, has no colours, or is not inside the folder.
    """
    name = PurePosixPath(file_name)
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{file_name!r} is not the name of a file inside {folder}.")
    path = folder / name
    try:
        with Image.open(path) as picture:
            picture.load()
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}.") from None
    except Exception as error:  # what Pillow's decoders raise on damaged data depends on the format
        raise ValueError(f"{path} cannot be read ({str(error) or type(error).__name__}).") from error
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


def few(ids: Iterable[int | str]) -> str:
    """Ids for a message: sorted, the first ten."""
    ids = sorted(ids, key=lambda each: (isinstance(each, str), each))
    return f"{ids[:10]}{' and more' if len(ids) > 10 else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m proscale_hf.evaluation.panoptic_quality",
        description="Print the panoptic quality of a prediction in COCO-panoptic format, as JSON.",
    )
    parser.add_argument("--gt-json", type=Path, required=True, help="ground truth: JSON")
    parser.add_argument("--gt-folder", type=Path, required=True, help="ground truth: folder of PNG files")
    parser.add_argument("--pred-json", type=Path, required=True, help="prediction: JSON")
    parser.add_argument("--pred-folder", type=Path, required=True, help="prediction: folder of PNG files")
    parser.add_argument("--processes", type=int, help="that share the work (default: one per core)")
    options = parser.parse_args()
    if options.processes is not None and options.processes < 1:
        sys.exit(f"error: --processes must be at least 1, got {options.processes}.")
    try:
        quality = panoptic_quality_of_files(
            options.gt_json, options.gt_folder, options.pred_json, options.pred_folder, options.processes
        )
    except BrokenProcessPool:
        sys.exit("error: a process was killed, probably for want of memory; try fewer --processes.")
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        print(json.dumps(quality, indent=1), flush=True)
    except BrokenPipeError:  # the reader, `head` say, has seen enough; Python is not to try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
