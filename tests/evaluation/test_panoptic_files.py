"""Panoptic quality of files: recorded numbers of the reference, bad files, and the command that prints it."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image

from paths import FIXTURES, ROOT
from proscale_hf.evaluation import panoptic_files
from proscale_hf.evaluation.panoptic_files import evaluate_files, panoptic_quality_of_files, read_colors
from proscale_hf.evaluation.panoptic_quality.__main__ import main


FIXTURE = FIXTURES / "panoptic_quality"
FILES = ("panoptic_gt.json", "panoptic_gt", "panoptic_pred.json", "panoptic_pred")


def test_equals_the_reference():
    result = panoptic_quality_of_files(*(FIXTURE / name for name in FILES))
    expected = json.loads((FIXTURE / "expected.json").read_text())
    assert result.keys() == expected.keys()
    for group in ("All", "Things", "Stuff"):
        assert result[group] == pytest.approx(expected[group], abs=1e-12)
    assert result["per_class"].keys() == expected["per_class"].keys()
    for category, quality in expected["per_class"].items():
        assert result["per_class"][category] == pytest.approx(quality, abs=1e-12)


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
    monkeypatch.setattr(panoptic_files, "IMAGES_AT_A_TIME", 2)
    paths = [FIXTURE / name for name in FILES]
    assert panoptic_quality_of_files(*paths, processes=2) == panoptic_quality_of_files(*paths, processes=1)


@pytest.mark.parametrize("processes", [1, 2])
def test_errors_in_files_name_the_image(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(panoptic_files, "IMAGES_AT_A_TIME", 2)
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
    expected = panoptic_files.make_measure(is_thing)
    for image in images:
        pairs = [(image, next(a for a in prediction["annotations"] if a["image_id"] == image["image_id"]))]
        expected.merge(panoptic_files.count_images(is_thing, FIXTURE / FILES[1], FIXTURE / FILES[3], pairs))
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
            "no prediction for the images with ids [3, 4, a]",
        ),
    ],
)
def test_command_says_what_is_wrong(tmp_path, monkeypatch, content, message):
    (tmp_path / "broken.json").write_text(content)
    arguments = command_arguments(tmp_path / "broken.json", *(FIXTURE / name for name in FILES[1:]))
    monkeypatch.setattr(sys, "argv", ["panoptic_quality", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert message in stopped.value.code
    assert len(stopped.value.code.splitlines()) == 1


def test_results_are_those_of_an_evaluation(tmp_path):
    truth = json.loads((FIXTURE / FILES[0]).read_text())
    nameless, named = truth["categories"][:2]
    del nameless["name"]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    results = evaluate_files(tmp_path / "truth.json", *(FIXTURE / name for name in FILES[1:]), processes=1)
    assert results["panoptic"] == panoptic_quality_of_files(*(FIXTURE / name for name in FILES), processes=1)
    assert (results["images"], results["skipped"]) == (len(truth["annotations"]), [])
    for category, name in ((nameless, str(nameless["id"])), (named, named["name"])):
        expected = {"id": category["id"], "name": name, "isthing": category["isthing"]}
        assert expected in results["categories"]


def end_this_process(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_named():
    with pytest.raises(ValueError, match="a process was killed"):
        list(panoptic_files.map_in_processes(end_this_process, range(4), processes=2))
