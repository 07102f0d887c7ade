"""Panoptic quality: recorded numbers of the reference, the rules for void and crowds, and bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from proscale_hf.evaluation import panoptic_quality
from proscale_hf.evaluation.panoptic_quality import (
    PanopticQuality,
    count_overlaps,
    panoptic_quality_of_files,
    read_segment_map,
)


FIXTURE = Path(__file__).parent / "fixtures" / "panoptic_quality"
FILES = ("panoptic_gt.json", "panoptic_gt", "panoptic_pred.json", "panoptic_pred")
THING, OTHER_THING, STUFF = 1, 2, 7


def segment(segment_id, category_id, **others):
    return {"id": segment_id, "category_id": category_id, **others}


def measure(prediction, prediction_segments, ground_truth, ground_truth_segments):
    quality = PanopticQuality([THING, OTHER_THING], [STUFF])
    quality.update(np.array(prediction), prediction_segments, np.array(ground_truth), ground_truth_segments)
    return quality


def test_equals_the_reference():
    result = panoptic_quality_of_files(*(FIXTURE / name for name in FILES))
    expected = json.loads((FIXTURE / "expected.json").read_text())
    assert result.keys() == expected.keys()
    for group in ("All", "Things", "Stuff"):
        assert result[group] == pytest.approx(expected[group], abs=1e-12)
    assert result["per_class"].keys() == expected["per_class"].keys()
    for category, quality in expected["per_class"].items():
        assert result["per_class"][category] == pytest.approx(quality, abs=1e-12)


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


def test_overlaps_with_large_and_unsorted_ids():
    prediction = np.array([[70000, 3], [3, 0]])
    ground_truth = np.array([[16_777_215, 0], [2, 2]])
    overlaps = count_overlaps(prediction, ground_truth, [0, 70000, 3], [0, 2, 16_777_215])
    assert overlaps.tolist() == [[0, 1, 0], [0, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("prediction", "segments", "message"),
    [
        (np.zeros((2, 3), int), [], "one size"),
        (np.ones((2, 2), int), [], r"ids \[1\] are in the map alone"),
        (np.zeros((2, 2), int), [segment(4, THING)], r"ids \[4\] in the list alone"),
        (np.ones((2, 2), int), [segment(1, 99)], r"unknown categories \[99\]"),
        (np.ones((2, 2), int), [segment(1, THING), segment(1, STUFF)], "twice"),
    ],
)
def test_bad_input_is_named(prediction, segments, message):
    with pytest.raises(ValueError, match=message):
        PanopticQuality([THING], [STUFF]).update(prediction, segments, np.zeros((2, 2), int), [])


def test_category_cannot_be_thing_and_stuff():
    with pytest.raises(ValueError, match="both as things and as stuff"):
        PanopticQuality([THING, STUFF], [STUFF])


def test_file_names_stay_in_their_folder():
    with pytest.raises(ValueError, match="plain file name"):
        read_segment_map(FIXTURE / "panoptic_gt", "../panoptic_pred/000000.png")


def command_arguments(*paths):
    options = ("--gt-json", "--gt-folder", "--pred-json", "--pred-folder")
    return [text for pair in zip(options, map(str, paths), strict=True) for text in pair]


def test_command_prints_json():
    command = [sys.executable, "-m", "proscale_hf.evaluation.panoptic_quality"]
    command += command_arguments(*(FIXTURE / name for name in FILES))
    finished = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert json.loads(finished.stdout)["All"]["pq"] == pytest.approx(0.47457954386627543, abs=1e-9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ('{"annotations": []}', "not in the COCO-panoptic format"),
        (
            '{"categories": [], "annotations": [{"image_id": 3, "file_name": "a", "segments_info": []}]}',
            "no prediction",
        ),
    ],
)
def test_command_says_what_is_wrong(tmp_path, monkeypatch, content, message):
    (tmp_path / "broken.json").write_text(content)
    arguments = command_arguments(tmp_path / "broken.json", *(FIXTURE / name for name in FILES[1:]))
    monkeypatch.setattr(sys, "argv", ["panoptic_quality", *arguments])
    with pytest.raises(SystemExit) as stopped:
        panoptic_quality.main()
    assert message in stopped.value.code
    assert len(stopped.value.code.splitlines()) == 1
