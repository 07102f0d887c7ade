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
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


VOID = 0


class PanopticQuality:
    """Counts matches image by image, and gives PQ, SQ and RQ over all of them.

    Args:
        thing_category_ids: categories counted under "Things".
        stuff_category_ids: categories counted under "Stuff".
        void_id: value of map pixels that belong to no segment, in prediction and ground truth.

    Raises:
        ValueError: a category is both thing and stuff.
    """

    def __init__(self, thing_category_ids: Iterable[int], stuff_category_ids: Iterable[int], void_id: int = VOID):
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

        Args:
            prediction: `(height, width)` integer map of segment ids.
            prediction_segments: `{"id", "category_id"}` of each predicted segment.
            ground_truth: `(height, width)` integer map of segment ids.
            ground_truth_segments: `{"id", "category_id"}` of each true segment, `"iscrowd"` where it is one.

        Raises:
            ValueError: the maps differ in size, or a map and its segments do not list the same ids, or a
                category is unknown.
        """
        prediction, ground_truth = np.asarray(prediction), np.asarray(ground_truth)
        if prediction.shape != ground_truth.shape or prediction.ndim != 2:
            raise ValueError(
                f"The maps must be (height, width) and of one size: the prediction is {prediction.shape}, "
                f"the ground truth {ground_truth.shape}."
            )
        predicted = self._index_segments(prediction, prediction_segments, "prediction")
        true = self._index_segments(ground_truth, ground_truth_segments, "ground truth")
        overlaps = count_overlaps(prediction, ground_truth, [self.void_id, *predicted], [self.void_id, *true])

        predicted_categories = np.array([segment["category_id"] for segment in predicted.values()], dtype=np.int64)
        true_categories = np.array([segment["category_id"] for segment in true.values()], dtype=np.int64)
        is_crowd = np.array([bool(segment.get("iscrowd", 0)) for segment in true.values()], dtype=bool)
        same_category = predicted_categories[:, None] == true_categories  # (predicted, true)

        predicted_areas = overlaps[1:].sum(axis=1)
        predicted_void = overlaps[1:, 0]
        intersections = overlaps[1:, 1:]
        true_areas = overlaps[:, 1:].sum(axis=0)
        unions = (predicted_areas - predicted_void)[:, None] + true_areas - intersections
        iou = intersections / np.maximum(unions, 1)
        matches = (iou > 0.5) & same_category & ~is_crowd

        # A prediction may lie on void and on a crowd of its category: those pixels cannot be called wrong.
        # The reference keeps one crowd per category and image, the last listed, so this does too.
        last_crowds = {true_categories[column]: column for column in np.flatnonzero(is_crowd)}
        counts_as_crowd = np.isin(np.arange(len(true)), list(last_crowds.values()))
        excusable = predicted_void + (intersections * (same_category & counts_as_crowd)).sum(axis=1)
        is_false_positive = ~matches.any(axis=1) & (excusable <= 0.5 * predicted_areas)
        is_false_negative = ~matches.any(axis=0) & ~is_crowd
        for row, column in zip(*np.nonzero(matches), strict=True):
            self.iou_sum[true_categories[column]] += iou[row, column]
            self.true_positives[true_categories[column]] += 1
        for category in predicted_categories[is_false_positive]:
            self.false_positives[category] += 1
        for category in true_categories[is_false_negative]:
            self.false_negatives[category] += 1

    def _index_segments(
        self, segment_map: np.ndarray, segments: Sequence[Mapping[str, Any]], name: str
    ) -> dict[int, Mapping[str, Any]]:
        """Segments by id, after checking them against their map and the categories."""
        by_id = {int(segment["id"]): segment for segment in segments}
        if len(by_id) != len(segments):
            raise ValueError(f"The {name} lists a segment id twice.")
        in_map = set(np.unique(segment_map).tolist()) - {self.void_id}
        if in_map != set(by_id):
            raise ValueError(
                f"The {name}'s map and list of segments differ: ids {sorted(in_map - set(by_id))} are "
                f"in the map alone, ids {sorted(set(by_id) - in_map)} in the list alone."
            )
        if unknown := {segment["category_id"] for segment in segments} - set(self.iou_sum):
            raise ValueError(f"The {name} has segments of unknown categories {sorted(unknown)}.")
        return by_id

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


def count_overlaps(
    prediction: np.ndarray,
    ground_truth: np.ndarray,
    prediction_ids: Sequence[int],
    ground_truth_ids: Sequence[int],
) -> np.ndarray:
    """Pixels that each predicted and each true segment share: `(prediction ids, ground-truth ids)` int64."""
    rows = rank_ids(prediction, prediction_ids)
    columns = rank_ids(ground_truth, ground_truth_ids)
    pairs = np.bincount(rows * len(ground_truth_ids) + columns, minlength=len(prediction_ids) * len(ground_truth_ids))
    return pairs.reshape(len(prediction_ids), len(ground_truth_ids))


def rank_ids(segment_map: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Position in `ids` of each pixel's id: `(height * width,)` int64. Every pixel's id must be in `ids`."""
    order = np.argsort(ids)
    return order[np.searchsorted(np.asarray(ids)[order], segment_map.ravel())]


def panoptic_quality_of_files(
    ground_truth_json: Path, ground_truth_folder: Path, prediction_json: Path, prediction_folder: Path
) -> dict[str, Any]:
    """Panoptic quality of a prediction in COCO-panoptic format; see `PanopticQuality.compute`.

    Args:
        ground_truth_json, prediction_json: COCO-panoptic JSON files; the ground truth's lists the categories.
        ground_truth_folder, prediction_folder: their folders of PNG files, with ids in base 256 (red lowest).

    Raises:
        OSError: a file is missing or no picture.
        ValueError: a file is no COCO-panoptic JSON, an image has no prediction, or a map and its list
            disagree.
    """
    ground_truth, prediction = read_json(ground_truth_json), read_json(prediction_json)
    try:
        categories = {category["id"]: bool(category["isthing"]) for category in ground_truth["categories"]}
        predictions = {annotation["image_id"]: annotation for annotation in prediction["annotations"]}
        measure = PanopticQuality(
            thing_category_ids=[category for category, is_thing in categories.items() if is_thing],
            stuff_category_ids=[category for category, is_thing in categories.items() if not is_thing],
        )
        for annotation in ground_truth["annotations"]:
            predicted = predictions.get(annotation["image_id"])
            update_from_files(measure, annotation, ground_truth_folder, predicted, prediction_folder)
    except (KeyError, TypeError) as error:
        raise ValueError(f"A file is not in the COCO-panoptic format: {error!r} is missing or misplaced.") from error
    return measure.compute()


def update_from_files(
    measure: PanopticQuality,
    true: Mapping[str, Any],
    ground_truth_folder: Path,
    predicted: Mapping[str, Any] | None,
    prediction_folder: Path,
) -> None:
    """Count one image, given the annotations of ground truth and prediction; errors name the image."""
    try:
        if predicted is None:
            raise ValueError("it has no prediction.")
        measure.update(
            read_segment_map(prediction_folder, predicted["file_name"]),
            predicted["segments_info"],
            read_segment_map(ground_truth_folder, true["file_name"]),
            true["segments_info"],
        )
    except ValueError as error:
        raise ValueError(f"Image {true['image_id']}: {error}") from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def read_segment_map(folder: Path, file_name: str) -> np.ndarray:
    """Read a COCO-panoptic PNG: `(height, width)` int64 ids.

    Raises:
        ValueError: the name leads out of the folder.
    """
    if Path(file_name).name != file_name:
        raise ValueError(f"{file_name!r} is not a plain file name.")
    with Image.open(Path(folder) / file_name) as picture:
        red, green, blue = np.moveaxis(np.asarray(picture.convert("RGB"), dtype=np.int64), -1, 0)
    return red + 256 * green + 256 * 256 * blue


def main() -> None:
    parser = argparse.ArgumentParser(description="Panoptic quality of a prediction in COCO-panoptic format.")
    parser.add_argument("--gt-json", type=Path, required=True, help="ground truth: JSON")
    parser.add_argument("--gt-folder", type=Path, required=True, help="ground truth: folder of PNG files")
    parser.add_argument("--pred-json", type=Path, required=True, help="prediction: JSON")
    parser.add_argument("--pred-folder", type=Path, required=True, help="prediction: folder of PNG files")
    arguments = parser.parse_args()
    try:
        quality = panoptic_quality_of_files(
            arguments.gt_json, arguments.gt_folder, arguments.pred_json, arguments.pred_folder
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(quality, indent=1))


if __name__ == "__main__":
    main()
