"""Average precision (AP) of instance masks, by COCO's rules and with pycocotools' numbers.

Which prediction finds which object is decided by pycocotools, image by image. What is kept of an image is 56 bytes for
each prediction: its score, and whether it is right, wrong or not counted at each IoU threshold and for each range of
areas. (`COCOeval` on a whole data set holds all masks until the end.)
"""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from proscale_hf.files.text import few


try:
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval, Params
except ImportError as error:
    raise ImportError('Mask AP needs pycocotools: pip install "proscale-hf[evaluate]"') from error


COCO_RULES = Params(iouType="segm")
ALL, SMALL, MEDIUM, LARGE = range(len(COCO_RULES.areaRng))  # ranges of areas
WRONG, RIGHT, NOT_COUNTED = range(3)
NOTHING_TO_FIND = -1.0  # pycocotools' value of a measure when the truth has no object

TRUTH_FIELDS = {"masks": "segmentation", "labels": "category_id", "iscrowd": "iscrowd", "area": "area"}
PREDICTION_FIELDS = {"masks": "segmentation", "labels": "category_id", "scores": "score"}


class Outcomes(NamedTuple):
    """What became of some predictions.

    Attributes:
        categories: `(predictions,)` int32 positions in the list of categories.
        ranks: `(predictions,)` int32, how many predictions of the category come before it in the image.
        scores: `(predictions,)` float64.
        outcomes: `(predictions, area ranges, IoU thresholds)` uint8: `WRONG`, `RIGHT` or `NOT_COUNTED`.
    """

    categories: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray
    outcomes: np.ndarray


class MaskAveragePrecision:
    """Compares predictions with the truth image by image, and gives AP and AR over all of them.

    Args:
        category_ids: the categories that are measured.
    """

    def __init__(self, category_ids: Iterable[int]):
        self.category_ids = sorted(set(category_ids))
        shape = (len(self.category_ids), len(COCO_RULES.areaRng))
        self.objects = np.zeros(shape, dtype=np.int64)  # how many there are to be found
        self.images: dict[int | str, Outcomes] = {}

    def update(self, image_id: int | str, predictions: Mapping[str, Any], truths: Mapping[str, Any]) -> None:
        """Count one image.

        Args:
            image_id: of the image. Among equal scores the order of ids decides, as in pycocotools.
            predictions: lists of one length: "masks" (compressed COCO run-length codes), "scores" and "labels"
                (category ids). Of each category the 100 with the highest scores count.
            truths: lists of one length: "masks", "labels", "iscrowd" (0 or 1) and "area" (pixels, as annotated).

        Raises:
            ValueError: the image was counted before, lists differ in length, a category is unknown, masks differ in
                size or are no compressed codes, or a score or area is not a finite number.
        """
        if image_id in self.images:
            raise ValueError(f"Image {image_id} was counted before.")
        try:
            true = self._as_annotations("truth", truths, TRUTH_FIELDS)
            predicted = self._as_annotations("prediction", predictions, PREDICTION_FIELDS)
            check_masks([annotation["segmentation"] for annotation in true + predicted])
        except ValueError as error:
            raise ValueError(f"Image {image_id}: {error}") from error
        for annotation in predicted:
            annotation["area"] = float(coco_mask.area(annotation["segmentation"]))
        self.images[image_id] = self._compare(true, predicted)

    def _as_annotations(
        self, name: str, instances: Mapping[str, Any], fields: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        """COCO annotations of an image 1, numbered from 1, as pycocotools takes 0 for "no match"."""
        columns = [list(instances[key]) for key in fields]
        if len({len(column) for column in columns}) > 1:
            lengths = ", ".join(f"{len(column)} {key}" for key, column in zip(fields, columns, strict=True))
            raise ValueError(f"the {name} has lists of different lengths: {lengths}.")
        annotations = [
            {"id": number, "image_id": 1, **dict(zip(fields.values(), values, strict=True))}
            for number, values in enumerate(zip(*columns, strict=True), start=1)
        ]
        for annotation in annotations:
            if annotation["category_id"] not in self.category_ids:
                raise ValueError(f"the {name} has an instance of the unknown category {annotation['category_id']}.")
            for field in annotation.keys() & {"score", "area"}:
                if not np.isfinite(annotation[field]):
                    raise ValueError(f"the {name} has an instance whose {field} is {annotation[field]}.")
        return annotations

    def _compare(self, true: list[dict[str, Any]], predicted: list[dict[str, Any]]) -> Outcomes:
        """What pycocotools says of one image."""
        category_ids = sorted({annotation["category_id"] for annotation in true + predicted})
        results = evaluate_image(true, predicted, category_ids) if category_ids else []
        parts = []
        for category_id, by_area in zip(category_ids, results, strict=True):
            position = self.category_ids.index(category_id)
            self.objects[position] += [np.count_nonzero(result["gtIgnore"] == 0) for result in by_area]
            scores = np.array(by_area[ALL]["dtScores"], dtype=np.float64)
            matches, is_ignored = (
                np.array([result[key] for result in by_area]) for key in ("dtMatches", "dtIgnore")
            )  # (area ranges, IoU thresholds, predictions)
            outcomes = np.where(is_ignored, NOT_COUNTED, np.where(matches > 0, RIGHT, WRONG)).astype(np.uint8)
            categories = np.full(len(scores), position, dtype=np.int32)
            ranks = np.arange(len(scores), dtype=np.int32)
            parts.append(Outcomes(categories, ranks, scores, np.moveaxis(outcomes, -1, 0)))
        return concatenate(parts)

    def state(self) -> dict[str, Any]:
        """All that was counted, as plain arrays that can be sent to another process."""
        return {
            "category_ids": self.category_ids,
            "objects": self.objects.copy(),
            "images": {image_id: tuple(outcomes) for image_id, outcomes in self.images.items()},
        }

    def merge(self, state: Mapping[str, Any]) -> None:
        """Count what another `MaskAveragePrecision`, of the same categories, has counted.

        Raises:
            ValueError: it has other categories, or has counted an image that was counted here, too.
        """
        if list(state["category_ids"]) != self.category_ids:
            raise ValueError("Cannot merge counts of other categories.")
        if twice := self.images.keys() & state["images"].keys():
            raise ValueError(f"Images {few(twice)} were counted twice.")
        self.objects += state["objects"]
        self.images |= {image_id: Outcomes(*arrays) for image_id, arrays in state["images"].items()}

    def compute(self) -> dict[str, Any]:
        """The measures (each 0..1, or -1 where the truth has no object) so far.

        Returns:
            - "AP": average precision, mean over IoU thresholds 0.5, 0.55 .. 0.95 and categories; "AP50" and "AP75": at
              one threshold; "APs", "APm", "APl": of objects below 32^2 pixels, up to 96^2, and above.
            - "AR1", "AR10", "AR100": average recall with that many predictions per image and category; "ARs", "ARm",
              "ARl": of those sizes, with 100.
            - "per_class": AP by category id (as text).
        """
        precision, recall = self._accumulate()
        sizes = {"s": SMALL, "m": MEDIUM, "l": LARGE}
        at_50, at_75 = (int(np.flatnonzero(np.isclose(COCO_RULES.iouThrs, value))[0]) for value in (0.5, 0.75))
        return {
            "AP": mean(precision[:, ALL]),
            "AP50": mean(precision[:, ALL, at_50]),
            "AP75": mean(precision[:, ALL, at_75]),
            **{f"AP{size}": mean(precision[:, area]) for size, area in sizes.items()},
            **{f"AR{most}": mean(recall[index, :, ALL]) for index, most in enumerate(COCO_RULES.maxDets)},
            **{
                f"AR{size}": mean(recall[-1, :, area]) for size, area in zip("sml", (SMALL, MEDIUM, LARGE), strict=True)
            },
            "per_class": {
                str(category_id): mean(precision[position, ALL])
                for position, category_id in enumerate(self.category_ids)
            },
        }

    def _accumulate(self) -> tuple[np.ndarray, np.ndarray]:
        """
        Returns:
            precision `(categories, area ranges, IoU thresholds, recalls)` with the most predictions per image, and
            recall `(numbers of predictions, categories, area ranges, IoU thresholds)`.
        """
        thresholds, recalls = COCO_RULES.iouThrs, COCO_RULES.recThrs
        precision = np.full((*self.objects.shape, len(thresholds), len(recalls)), NOTHING_TO_FIND)
        recall = np.full((len(COCO_RULES.maxDets), *self.objects.shape, len(thresholds)), NOTHING_TO_FIND)
        in_order = sorted(self.images, key=lambda image_id: (isinstance(image_id, str), image_id))
        everything = concatenate([self.images[image_id] for image_id in in_order])
        by_score = np.argsort(-everything.scores, kind="stable")
        for position, objects in enumerate(self.objects):
            has_objects = objects > 0  # (area ranges,)
            chosen = by_score[everything.categories[by_score] == position]
            for index, most in enumerate(COCO_RULES.maxDets):
                kept = chosen[everything.ranks[chosen] < most]
                outcomes = everything.outcomes[kept][:, has_objects]
                right = np.cumsum(outcomes == RIGHT, axis=0)
                wrong = np.cumsum(outcomes == WRONG, axis=0)
                recall_so_far = right / objects[has_objects, None]  # (predictions, area ranges, IoU thresholds)
                recall[index, position, has_objects] = recall_so_far[-1] if len(kept) else 0
            precision[position, has_objects] = sample_precision(right, wrong, recall_so_far)
        return precision, recall


def sample_precision(right: np.ndarray, wrong: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """The highest precision at each of COCO's recalls or beyond, 0 where no prediction gets that far.

    Args:
        right, wrong, recall: `(predictions, area ranges, IoU thresholds)`, of all predictions up to each.

    Returns:
        `(area ranges, IoU thresholds, recalls)`
    """
    precision = right / np.maximum(right + wrong, 1)
    best_from_here = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    best_from_here = np.concatenate([best_from_here, np.zeros((1, *precision.shape[1:]))])
    sampled = np.empty((*precision.shape[1:], len(COCO_RULES.recThrs)))
    for column in np.ndindex(precision.shape[1:]):
        first = np.searchsorted(recall[(slice(None), *column)], COCO_RULES.recThrs)
        sampled[column] = best_from_here[(first, *column)]
    return sampled


def evaluate_image(
    true: list[dict[str, Any]], predicted: list[dict[str, Any]], category_ids: Sequence[int]
) -> list[list[dict[str, Any]]]:
    """pycocotools' matches of one image: for each category a list with a result for each range of areas."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress
        sides = []
        for annotations in (true, predicted):
            side = COCO()
            side.dataset = {
                "images": [{"id": 1, "height": None, "width": None}],  # the masks have the size
                "categories": [{"id": category_id} for category_id in category_ids],
                "annotations": annotations,
            }
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, iouType="segm")
        evaluation.evaluate()
    results = evaluation.evalImgs  # (categories, area ranges) in one list
    ranges = len(COCO_RULES.areaRng)
    return [results[start : start + ranges] for start in range(0, len(results), ranges)]


def check_masks(masks: Sequence[Mapping[str, Any]]) -> None:
    """Raises a ValueError unless all masks are compressed COCO run-length codes of one size."""
    if not all(isinstance(mask["counts"], str | bytes) for mask in masks):
        raise ValueError("masks must be compressed COCO run-length codes, whose counts are text or bytes.")
    sizes = {tuple(mask["size"]) for mask in masks}
    if len(sizes) > 1:
        raise ValueError(f"masks have the different sizes (height, width) {sorted(sizes)}.")


def concatenate(parts: Sequence[Outcomes]) -> Outcomes:
    """All predictions of some images or categories, in order."""
    shape = (0, len(COCO_RULES.areaRng), len(COCO_RULES.iouThrs))
    nothing = Outcomes(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0), np.zeros(shape, np.uint8))
    return Outcomes(*map(np.concatenate, zip(nothing, *parts, strict=True)))


def mean(values: np.ndarray) -> float:
    """The mean of those values that have objects to find."""
    measured = values[values != NOTHING_TO_FIND]
    return float(measured.mean()) if measured.size else NOTHING_TO_FIND
