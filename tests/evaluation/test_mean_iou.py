"""Mean IoU: a computation of its own in numpy, void, absent classes and bad input."""

import pickle

import numpy as np
import pytest

from proscale_hf.evaluation.mean_iou import MeanIoU


VOID = 255


def expected_measures(predictions, truths, labels):
    """The definitions, class by class over all known pixels of all images."""
    known = truths != VOID
    predictions, truths = predictions[known], truths[known]
    iou, accuracy, weights = {}, {}, {}
    for label in range(labels):
        is_called, is_true = predictions == label, truths == label
        if (is_called | is_true).any():
            iou[label] = (is_called & is_true).sum() / (is_called | is_true).sum()
            weights[label] = is_true.mean()
        if is_true.any():
            accuracy[label] = is_called[is_true].mean()
    return {
        "mIoU": np.mean(list(iou.values())),
        "fwIoU": sum(iou[label] * weights[label] for label in iou),
        "mACC": np.mean(list(accuracy.values())),
        "pACC": np.mean(predictions == truths),
        "n": len(iou),
        "per_class": {str(label): iou.get(label) for label in range(labels)},
    }


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_equals_the_definitions(dtype):
    generator = np.random.default_rng(0)
    values = np.array([0, 1, 2, 4, VOID])
    truths = generator.choice(values, (3, 12, 10)).astype(dtype)
    predictions = np.where(
        generator.random(truths.shape) < 0.5, truths, generator.choice([0, 1, 3, VOID], truths.shape)
    )
    measure = MeanIoU(7)
    for prediction, truth in zip(predictions.astype(dtype), truths, strict=True):
        measure.update(prediction, truth)
    expected = expected_measures(predictions, truths, labels=7)
    assert measure.compute().pop("per_class") == pytest.approx(expected.pop("per_class"))
    assert {key: value for key, value in measure.compute().items() if key != "per_class"} == pytest.approx(expected)
    assert expected["n"] == 5  # 3 is never true, 5 and 6 are neither true nor predicted


def test_void_of_the_truth_is_out_and_void_of_the_prediction_is_missed():
    measure = MeanIoU(2)
    measure.update(np.array([[0, 1, 0, VOID]]), np.array([[0, VOID, 0, 0]]))
    assert measure.compute() == {
        "mIoU": pytest.approx(2 / 3),
        "fwIoU": pytest.approx(2 / 3),
        "mACC": pytest.approx(2 / 3),
        "pACC": pytest.approx(2 / 3),
        "n": 1,
        "per_class": {"0": pytest.approx(2 / 3), "1": None},
    }


def test_measures_of_parts_add_up():
    maps = np.random.default_rng(1).integers(0, 3, (4, 5, 6))
    whole, first, second = MeanIoU(3), MeanIoU(3), MeanIoU(3)
    for part, prediction, truth in ((first, maps[0], maps[1]), (second, maps[2], maps[3])):
        part.update(prediction, truth)
        whole.update(prediction, truth)
    first.merge(pickle.loads(pickle.dumps(second.state())))
    assert first.compute() == whole.compute()
    with pytest.raises(ValueError, match="4 labels into 3"):
        first.merge(MeanIoU(4).state())


def test_nothing_seen_gives_zeros():
    measure = MeanIoU(2, names=["cat", 7])
    measure.update(np.zeros((2, 2), int), np.full((2, 2), VOID))
    result = measure.compute()
    assert result.pop("per_class") == {"cat": None, "7": None}
    assert set(result.values()) == {0}


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        ([[0, 1]], [[0], [1]], r"one size: the prediction is \(1, 2\)"),
        ([[0, 3]], [[0, 1]], r"prediction has values \[3\]"),
        ([[0, 1]], [[-1, 1]], r"truth has values \[-1\]"),
    ],
)
def test_bad_maps_are_named(prediction, truth, message):
    with pytest.raises(ValueError, match=message):
        MeanIoU(3).update(np.array(prediction), np.array(truth))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"number_of_labels": 0}, "at least one"), ({"number_of_labels": 3, "ignore_index": 1}, "is one of the 3 labels")],
)
def test_bad_labels_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MeanIoU(**arguments)
    with pytest.raises(ValueError, match="different names"):
        MeanIoU(2, names=["cat", "cat"])
