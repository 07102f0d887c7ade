"""Panoptic quality: recorded numbers of the reference, the rules for void and crowds, files and bad input."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from paths import FIXTURES, ROOT
from proscale_hf.evaluation import panoptic_quality
from proscale_hf.evaluation.panoptic_quality import (
    PanopticQuality,
    count_overlaps,
    panoptic_quality_of_files,
    read_colors,
)


FIXTURE = FIXTURES / "panoptic_quality"
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


@pytest.mark.parametrize("name", ["../panoptic_pred/000000.png", "/etc/hostname"])
def test_file_names_stay_in_their_folder(name):
    with pytest.raises(ValueError, match="inside"):
        read_colors(FIXTURE / "panoptic_gt", name)


def test_pictures_that_are_no_maps_of_colors_are_named(tmp_path):
    Image.new("P", (2, 2)).save(tmp_path / "palette.png")
    (tmp_path / "damaged.png").write_bytes(b"PNG")
    for name, message in (("palette", "its mode is P"), ("damaged", "cannot be read"), ("absent", "there is no file")):
        with pytest.raises(ValueError, match=rf"{name}\.png.*{message}|{message}.*{name}\.png"):
            read_colors(tmp_path, f"{name}.png")


def test_opacity_is_no_part_of_the_id(tmp_path):
    Image.new("RGBA", (2, 1), (1, 2, 3, 4)).save(tmp_path / "map.png")
    assert read_colors(tmp_path, "map.png").tolist() == [[[1, 2, 3], [1, 2, 3]]]


def test_several_processes_give_the_same(monkeypatch):
    monkeypatch.setattr(panoptic_quality, "IMAGES_AT_A_TIME", 2)
    paths = [FIXTURE / name for name in FILES]
    assert panoptic_quality_of_files(*paths, processes=2) == panoptic_quality_of_files(*paths, processes=1)


@pytest.mark.parametrize("processes", [1, 2])
def test_errors_in_files_name_the_image(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(panoptic_quality, "IMAGES_AT_A_TIME", 2)
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    content = json.loads((FIXTURE / "panoptic_pred.json").read_text())
    annotation = content["annotations"][-1]
    removed = annotation["segments_info"].pop()
    (tmp_path / "panoptic_pred.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"image {annotation['image_id']}: segments \[{removed['id']}\]"):
        panoptic_quality_of_files(*(tmp_path / name for name in FILES), processes=processes)


def test_predictions_of_other_images_are_ignored(tmp_path):
    content = json.loads((FIXTURE / "panoptic_pred.json").read_text())
    content["annotations"].append({"image_id": -1, "file_name": "nowhere.png", "segments_info": []})
    (tmp_path / "more.json").write_text(json.dumps(content))
    paths = [FIXTURE / name for name in FILES]
    more = [*paths[:2], tmp_path / "more.json", paths[3]]
    assert panoptic_quality_of_files(*more, processes=1) == panoptic_quality_of_files(*paths, processes=1)


def test_an_image_that_the_truth_lists_twice_counts_twice(tmp_path):
    """As in the reference, which goes through the truth's list."""
    truth, prediction = (json.loads((FIXTURE / name).read_text()) for name in FILES[::2])
    images = [truth["annotations"][position] for position in (0, 1, 1)]
    (tmp_path / "twice.json").write_text(json.dumps({**truth, "annotations": images}))
    result = panoptic_quality_of_files(tmp_path / "twice.json", *(FIXTURE / name for name in FILES[1:]), processes=1)
    is_thing = {category["id"]: category["isthing"] == 1 for category in truth["categories"]}
    expected = panoptic_quality.make_measure(is_thing)
    for image in images:
        pairs = [(image, next(a for a in prediction["annotations"] if a["image_id"] == image["image_id"]))]
        expected.merge(panoptic_quality.count_images(is_thing, FIXTURE / FILES[1], FIXTURE / FILES[3], pairs))
    assert result["All"] == pytest.approx(expected.compute()["All"], abs=1e-12)


@pytest.mark.parametrize(
    ("field", "value"), [("id", "x"), ("id", None), ("category_id", 2**70), ("category_id", "1"), ("area", None)]
)
def test_annotations_of_another_format_are_named(tmp_path, field, value):
    content = json.loads((FIXTURE / "panoptic_gt.json").read_text())
    annotation = content["annotations"][0]
    annotation["segments_info"][0][field] = value
    (tmp_path / "other.json").write_text(json.dumps(content))
    paths = (tmp_path / "other.json", *(FIXTURE / name for name in FILES[1:]))
    with pytest.raises(ValueError, match=rf"image {annotation['image_id']}: .* not in the COCO-panoptic format"):
        panoptic_quality_of_files(*paths, processes=1)


def command_arguments(*paths):
    options = ("--gt-json", "--gt-folder", "--pred-json", "--pred-folder")
    return [text for pair in zip(options, map(str, paths), strict=True) for text in pair]


def test_command_prints_json():
    command = [sys.executable, "-m", "proscale_hf.evaluation.panoptic_quality"]
    command += command_arguments(*(FIXTURE / name for name in FILES))
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(finished.stdout)["All"]["pq"] == pytest.approx(0.47457954386627543, abs=1e-9)


def test_command_whose_reader_has_left():
    command = [sys.executable, "-m", "proscale_hf.evaluation.panoptic_quality"]
    command += command_arguments(*(FIXTURE / name for name in FILES))
    reader, writer = os.pipe()
    os.close(reader)
    finished = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "broken.json is not a JSON file"),
        ("[]", "broken.json is not in the COCO-panoptic format"),
        ('{"annotations": []}', "broken.json is not in the COCO-panoptic format: 'categories' is missing"),
        ('{"categories": [], "annotations": []}', "broken.json has no annotations"),
        (
            '{"categories": [], "annotations": [{"image_id": 3, "file_name": "a", "segments_info": []}]}',
            "no prediction for the images with ids [3]",
        ),
        (
            '{"categories": [], "annotations": [{"image_id": "a"}, {"image_id": 4}, {"image_id": 3}]}',
            "no prediction for the images with ids [3, 4, 'a']",
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
