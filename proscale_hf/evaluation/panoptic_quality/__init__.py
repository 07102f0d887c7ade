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

`panoptic_files.py` measures files in COCO-panoptic format.
"""

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

import numpy as np

from proscale_hf.files.text import few
from proscale_hf.processing.segment_ids import VOID_ID, crowd_flag


COUNTS = ("iou_sum", "true_positives", "false_positives", "false_negatives")


class PanopticQuality:
    """Counts matches image by image, and gives PQ, SQ and RQ over all of them.

    Args:
        thing_category_ids: categories counted under "Things".
        stuff_category_ids: categories counted under "Stuff".
        void_id: value of pixels of no segment, in the maps of prediction and ground truth.

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
        is_crowd = np.array([crowd_flag(segment.get("iscrowd") or 0) for segment in true.values()], dtype=bool)
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
