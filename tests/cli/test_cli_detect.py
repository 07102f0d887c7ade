"""`proscale detect`: a picture with boxes, COCO's results, and what it refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from helpers import tiny_detector
from proscale_hf import ProScaleDinoImageProcessorPil
from proscale_hf.cli import main
from proscale_hf.cli.loading import DEMO_MODEL


CATEGORIES = [{"id": 10 * label, "name": name} for label, name in enumerate(("cat", "dog", "cow", "hen"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    names = {label: category["name"] for label, category in enumerate(CATEGORIES)}
    tiny_detector(id2label=names, categories=CATEGORIES).save_pretrained(folder)
    ProScaleDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(folder / "000042.png")
    return folder


def test_a_picture_and_results_are_written(folder, tmp_path, capsys):
    target, results = tmp_path / "boxes.png", tmp_path / "results.json"
    photo = folder / "000042.png"
    options = ["--model", str(folder), "--threshold", "0", "--output", str(target), "--json", str(results)]
    assert main(["detect", str(photo), *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2] == "and 6 more" and printed[-1] == f"wrote {target} and {results}"
    drawn = Image.open(target)
    assert drawn.width / drawn.height == pytest.approx(90 / 60) and len(drawn.getcolors(2**24)) > 1000
    found = json.loads(results.read_text())
    assert len(found) == 36  # nine queries, four classes
    assert {entry["image_id"] for entry in found} == {42}
    assert {entry["category_id"] for entry in found} == {0, 10, 20, 30}
    scores = [entry["score"] for entry in found]
    assert scores == sorted(scores, reverse=True)
    for left, top, width, height in (entry["bbox"] for entry in found):
        assert 0 <= left <= left + width <= 90.01 and 0 <= top <= top + height <= 60.01


def test_nothing_found_is_said(folder, tmp_path, capsys):
    target = tmp_path / "boxes.png"
    photo = folder / "000042.png"
    options = ["--model", str(folder), "--threshold", "1", "--output", str(target), "--json", str(tmp_path / "r.json")]
    assert main(["detect", str(photo), *options]) == 0
    assert capsys.readouterr().out.startswith("nothing found\n")
    assert target.exists() and json.loads((tmp_path / "r.json").read_text()) == []


@pytest.mark.parametrize(
    ("command", "model", "message"),
    [
        ("detect", DEMO_MODEL, "is a model for another command: its model_type is proscale_mask2former"),
        ("segment", None, "is a model for another command: its model_type is proscale_dino"),
    ],
)
def test_a_model_of_another_family_is_refused(folder, tmp_path, capsys, command, model, message):
    photo = str(folder / "000042.png")
    output = str(tmp_path / "out.png")
    assert main([command, photo, "--model", str(model or folder), "--output", output]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "2"], "is not a number from 0 to 1"),
        (["--output", "boxes.txt"], "boxes.txt"),
        (["--output", "same.png", "--json", "same.png"], "name the same file"),
    ],
)
def test_wrong_options_are_refused(folder, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["detect", str(folder / "000042.png"), "--model", str(folder), *options])
    except SystemExit as end:  # of the parser
        status = end.code
    assert status == 2 and message in capsys.readouterr().err and not any(tmp_path.iterdir())
