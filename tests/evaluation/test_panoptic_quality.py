"""Panoptic quality of maps: the rules for void and crowds, counts that add up, and bad input."""

import pickle

import numpy as np
import pytest

from proscale_hf.evaluation.panoptic_quality import PanopticQuality, count_overlaps


THING, OTHER_THING, STUFF = 1, 2, 7


def segment(segment_id, category_id, **others):
    return {"id": segment_id, "category_id": category_id, **others}


def measure(prediction, prediction_segments, ground_truth, ground_truth_segments):
    quality = PanopticQuality([THING, OTHER_THING], [STUFF])
    quality.update(np.array(prediction), prediction_segments, np.array(ground_truth), ground_truth_segments)
    return quality


def test_overlap_of_exactly_half_is_no_match():
    half = measure([[1, 1, 0, 0]], [segment(1, THING)], [[5, 5, 5, 5]], [segment(5, THING)])
    assert (half.true_positives[THING], half.false_positives[THING], half.false_negatives[THING]) == (0, 1, 1)
    more = measure([[1, 1, 1, 0]], [segment(1, THING)], [[5, 5, 5, 5]], [segment(5, THING)])
    assert more.true_positives[THING] == 1
    assert more.compute()["Things"] == {"pq": 0.75, "sq": 0.75, "rq": 1.0, "n": 1}


def test_void_does_not_count_into_the_union():
    quality = measure([[1, 1, 1, 1]], [segment(1, THING)], [[5, 5, 0, 0]], [segment(5, THING)])
    assert quality.compute()["Things"]["pq"] == 1.0


def test_category_must_agree():
    quality = measure([[1, 1]], [segment(1, THING)], [[5, 5]], [segment(5, OTHER_THING)])
    assert quality.false_positives[THING] == quality.false_negatives[OTHER_THING] == 1
    assert quality.compute()["All"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 2}


@pytest.mark.parametrize(("void_pixels", "false_positives"), [(2, 1), (3, 0)])
def test_mostly_void_prediction_is_excused(void_pixels, false_positives):
    ground_truth = [0] * void_pixels + [5] * (10 - void_pixels)
    quality = measure(
        [[1, 1, 1, 1] + [2] * 6], [segment(1, THING), segment(2, STUFF)], [ground_truth], [segment(5, STUFF)]
    )
    assert quality.false_positives[THING] == false_positives


@pytest.mark.parametrize(("crowd_category", "false_positives"), [(THING, 0), (OTHER_THING, 1)])
def test_crowds_are_neither_found_nor_missed(crowd_category, false_positives):
    quality = measure([[1, 1, 1]], [segment(1, THING)], [[5, 5, 5]], [segment(5, crowd_category, iscrowd=1)])
    assert sum(quality.true_positives.values()) == sum(quality.false_negatives.values()) == 0
    assert quality.false_positives[THING] == false_positives


def test_images_add_up():
    quality = PanopticQuality([THING], [STUFF])
    empty = np.zeros((1, 4), dtype=int)
    found = np.array([[9, 9, 9, 9]])
    quality.update(found, [segment(9, THING)], found, [segment(9, THING)])
    quality.update(empty, [], found, [segment(9, THING)])
    quality.update(found, [segment(9, THING)], np.array([[1, 1, 1, 1]]), [segment(1, STUFF)])
    assert quality.compute()["Things"] == {"pq": 0.5, "sq": 1.0, "rq": 0.5, "n": 1}
    assert quality.compute()["All"]["pq"] == 0.25


def test_nothing_seen_gives_zeros():
    result = PanopticQuality([THING], [STUFF]).compute()
    assert result["All"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 0}


def test_measures_of_parts_add_up():
    found = (np.array([[9, 9, 8, 8]]), [segment(9, THING), segment(8, STUFF)])
    true = (np.array([[9, 9, 9, 8]]), [segment(9, THING), segment(8, STUFF)])
    whole, first, second = (PanopticQuality([THING], [STUFF]) for _ in range(3))
    for part, image in ((first, found), (second, true), (second, found)):
        part.update(*image, *true)
        whole.update(*image, *true)
    first.merge(pickle.loads(pickle.dumps(second.state())))
    assert first.compute() == whole.compute()
    assert first.true_positives[THING] == 3
    with pytest.raises(ValueError, match="other categories"):
        first.merge(PanopticQuality([THING], []).state())


def test_crowds_of_several_categories():
    """Each excuses predictions of its own category; of two of one category the last listed does."""
    crowds = [segment(1, THING, iscrowd=1), segment(2, OTHER_THING, iscrowd=1), segment(3, OTHER_THING, iscrowd=1)]
    prediction = [[4, 4, 5, 5, 6, 6]]
    segments = [segment(4, THING), segment(5, OTHER_THING), segment(6, OTHER_THING)]
    quality = measure(prediction, segments, [[1, 1, 2, 2, 3, 3]], crowds)
    assert quality.false_positives == {THING: 0, OTHER_THING: 1, STUFF: 0}


def test_ground_truth_is_taken_as_it_comes():
    """As the reference does: what has no pixels is missed, what is not listed is not void, listed areas count."""
    quality = measure([[4, 4, 0]], [segment(4, THING)], [[8, 8, 0]], [segment(3, STUFF), segment(5, 99)])
    assert (quality.false_positives[THING], quality.false_negatives[STUFF]) == (1, 1)
    quality = measure([[4, 4]], [segment(4, THING)], [[5, 5]], [segment(5, THING, area=3)])
    assert quality.compute()["Things"]["sq"] == pytest.approx(2 / 3)


def as_colors(segment_map):
    return (segment_map[..., None] // 256 ** np.arange(3) % 256).astype(np.uint8)  # (height, width, 3)


@pytest.mark.parametrize("shape", [(7, 9), (1, 1)])
def test_overlaps_of_ids_and_colors(shape):
    generator = np.random.default_rng(0)
    ids = np.array([0, 3, 259, 70_000, 16_777_215])
    first, second = ids[generator.integers(0, 5, (2, *shape))]
    expected = [[np.sum((first == i) & (second == j)) for j in np.unique(second)] for i in np.unique(first)]
    for first_map, second_map in ((first, second), (as_colors(first), as_colors(second))):
        first_ids, second_ids, pixels = count_overlaps(first_map, second_map)
        assert (first_ids.tolist(), second_ids.tolist()) == (np.unique(first).tolist(), np.unique(second).tolist())
        assert pixels.tolist() == expected


@pytest.mark.parametrize(
    ("prediction", "segments", "message"),
    [
        (np.zeros((2, 3), int), [], "one size, but are 2 x 3 and 2 x 2"),
        (np.zeros((2, 2, 3), int), [], r"but are \(2, 2, 3\) and \(2, 2\)"),
        (np.ones((2, 2), int), [], r"segments \[1\] of the prediction are in its map \(PNG\), not"),
        (np.zeros((2, 2), int), [segment(4, THING)], r"segments \[4\] of the prediction are in its list \(JSON\), not"),
        (np.ones((2, 2), int), [segment(1, 99)], "segment 1 of the prediction has the unknown category 99"),
        (np.ones((2, 2), int), [segment(1, THING), segment(1, STUFF)], "twice"),
    ],
)
def test_bad_input_is_named(prediction, segments, message):
    with pytest.raises(ValueError, match=message):
        PanopticQuality([THING], [STUFF]).update(prediction, segments, np.zeros((2, 2), int), [])


def test_category_cannot_be_thing_and_stuff():
    with pytest.raises(ValueError, match="both as things and as stuff"):
        PanopticQuality([THING, STUFF], [STUFF])


def test_crowds_may_be_texts():
    arguments = [[1, 1, 1]], [segment(1, THING)], [[5, 5, 5]]
    results = {flag: measure(*arguments, [segment(5, THING, iscrowd=flag)]).compute() for flag in (0, 1, "0", "1")}
    assert results["0"] == results[0] != results["1"] == results[1]
    with pytest.raises(ValueError, match='"iscrowd" must be 0 or 1'):
        measure(*arguments, [segment(5, THING, iscrowd="no")])
