"""Mean intersection over union (mIoU) of semantic segmentation, over all pixels of a data set.

What is kept is the confusion matrix: how many pixels of each true class were called which class. Per class,

    IoU = pixels rightly called so / (true pixels + pixels called so - pixels rightly called so)

Void pixels of the truth do not count at all; pixels that the prediction leaves void are missed. A class that occurs
neither in truth nor in prediction has no IoU and is left out of the mean, as in the scripts of Cityscapes and of
mmsegmentation. (detectron2 also leaves out classes that are predicted, but never true. Where every class occurs in the
truth, as in the whole of a benchmark, that is the same.)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from proscale_hf.files.text import few


IGNORE_INDEX = 255


class MeanIoU:
    """Counts pixels image by image, and gives mIoU and accuracies over all of them.

    Args:
        number_of_labels: labels are 0 .. `number_of_labels` - 1.
        ignore_index: value of void pixels, in truth and prediction; no label.
        names: what the classes are called in the result, in label order. Default: their labels.

    Raises:
        ValueError: there are no labels, `ignore_index` is one of them, or there is not one name for each.
    """

    def __init__(self, number_of_labels: int, ignore_index: int = IGNORE_INDEX, names: Sequence[Any] | None = None):
        if number_of_labels < 1:
            raise ValueError(f"There must be at least one label, got {number_of_labels}.")
        if 0 <= ignore_index < number_of_labels:
            raise ValueError(f"ignore_index {ignore_index} is one of the {number_of_labels} labels; choose another.")
        self.number_of_labels = number_of_labels
        self.ignore_index = ignore_index
        self.names = [str(name) for name in (range(number_of_labels) if names is None else names)]
        if len(set(self.names)) != number_of_labels:
            raise ValueError(f"There must be {number_of_labels} different names, one for each label.")
        self.confusion = np.zeros((number_of_labels, number_of_labels + 1), dtype=np.int64)  # (true, predicted or void)

    def update(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Count one image.

        Args:
            prediction: `(height, width)` integer map of labels, `ignore_index` where there is none.
            truth: `(height, width)` integer map of labels, `ignore_index` where nobody knows.

        Raises:
            ValueError: the maps differ in size, or have values that are no labels.
        """
        prediction, truth = np.asarray(prediction), np.asarray(truth)
        if prediction.shape != truth.shape or prediction.ndim != 2:
            raise ValueError(
                f"The maps must be (height, width) and of one size: the prediction is {prediction.shape}, "
                f"the truth {truth.shape}."
            )
        is_known = truth != self.ignore_index
        is_left_void = prediction == self.ignore_index
        self._check_labels(prediction[~is_left_void], "prediction")
        true_labels = truth[is_known].astype(np.int64)
        self._check_labels(true_labels, "truth")
        called = np.where(is_left_void, self.number_of_labels, prediction)[is_known]
        pairs = np.bincount(true_labels * (self.number_of_labels + 1) + called, minlength=self.confusion.size)
        self.confusion += pairs.reshape(self.confusion.shape)

    def _check_labels(self, labels: np.ndarray, name: str) -> None:
        is_wrong = (labels < 0) | (labels >= self.number_of_labels)
        if is_wrong.any():
            raise ValueError(
                f"The {name} has values {few(set(labels[is_wrong].tolist()))}, which are neither labels "
                f"(0 to {self.number_of_labels - 1}) nor ignore_index ({self.ignore_index})."
            )

    def state(self) -> dict[str, np.ndarray]:
        """All that was counted, as plain arrays that can be sent to another process."""
        return {"confusion": self.confusion.copy()}

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        """Count what another `MeanIoU`, of the same labels, has counted.

        Raises:
            ValueError: it has other labels.
        """
        confusion = np.asarray(state["confusion"])
        if confusion.shape != self.confusion.shape:
            raise ValueError(f"Cannot merge counts of {len(confusion)} labels into {self.number_of_labels}.")
        self.confusion += confusion

    def compute(self) -> dict[str, Any]:
        """The measures (each 0..1) so far.

        Returns:
            - "mIoU": mean over the `n` classes that occur in truth or prediction; 0 if none does.
            - "fwIoU": the same, weighted by true pixels.
            - "mACC": the share of a class's true pixels that is found, mean over the classes that occur in the truth.
            - "pACC": the share of all known pixels that is right.
            - "n": how many classes occur.
            - "per_class": IoU by name; None for a class that does not occur.
        """
        right = self.confusion.diagonal()
        true_pixels = self.confusion.sum(axis=1)
        unions = true_pixels + self.confusion[:, :-1].sum(axis=0) - right
        iou = right / np.maximum(unions, 1)
        known_pixels = max(int(true_pixels.sum()), 1)
        occurs, is_true = unions > 0, true_pixels > 0
        return {
            "mIoU": mean(iou[occurs]),
            "fwIoU": float((iou * true_pixels).sum() / known_pixels),
            "mACC": mean(right[is_true] / true_pixels[is_true]),
            "pACC": float(right.sum() / known_pixels),
            "n": int(occurs.sum()),
            "per_class": {
                name: float(value) if has_value else None
                for name, value, has_value in zip(self.names, iou, occurs, strict=True)
            },
        }


def mean(values: np.ndarray) -> float:
    """The mean, and 0 of nothing."""
    return float(values.mean()) if len(values) else 0.0
