"""`proscale figure`: a picture for each name, and one line where there can be none."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import tiny_config, tiny_model
from proscale_hf import ProScaleMask2FormerImageProcessorPil
from proscale_hf.cli import console, main


pytest.importorskip("matplotlib")


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of a model with token recalibration, and of one without."""
    folders = {}
    for name, kind in (("with", "linear"), ("without", "none")):
        folders[name] = str(tmp_path_factory.mktemp("models") / name)
        tiny_model(token_recalibration=kind).save_pretrained(folders[name])
        processor = ProScaleMask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
        processor.save_pretrained(folders[name])
    return folders


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    """A folder with two photos and a table of results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(console, "PATIENCE", 600.0)  # a slow machine must not add lines to stderr
    for seed, name in enumerate(("a.png", "b.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (72, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(name)
    Path("results.csv").write_text("name,gflops,pq\nold,2,50\nnew,1,51\n")


def draws(capsys, *arguments: str) -> tuple[int, int]:
    """Runs a command that must write figure.png, twice the same; returns the picture's size."""
    contents = []
    for _ in range(2):
        assert main(["figure", *arguments, "--output", "figure.png"]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out == "wrote figure.png\n"
        contents.append(Path("figure.png").read_bytes())
    assert contents[0] == contents[1]
    with Image.open("figure.png") as picture:
        return picture.size


def fails(capsys, *arguments: str, exit_code: int = 1) -> str:
    """Runs a command that must fail with one line and leave no file behind; returns that line."""
    before = sorted(os.listdir())
    assert main(["figure", *arguments]) == exit_code
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
    assert sorted(os.listdir()) == before
    return output.err


def test_compute_distribution(capsys, models):
    tiny_config().save_pretrained("config")
    small = draws(capsys, "compute-distribution", models["with"], "--size", "64x96")
    three = [models["with"], f"other={models['without']}", "config/config.json"]
    large = draws(capsys, "compute-distribution", *three, "--size", "64x96")
    assert small[0] == large[0] and small[1] < large[1]


@pytest.mark.parametrize("name", ["token-similarity", "recalibration"])
def test_figures_of_one_model(capsys, models, name):
    draws(capsys, name, "a.png", "b.png", "--model", models["with"])


def test_cost_and_quality(capsys, models):
    size = draws(capsys, "cost-and-quality", "results.csv")
    assert draws(capsys, "cost-and-quality", "results.csv", "--baseline", "new") == size
    Path("found.csv").write_text(f"name,pq\n{models['with']},40\n")
    assert draws(capsys, "cost-and-quality", "results.csv", "found.csv", "--size", "64x96") == size


def test_panoptic_maps(capsys, models):
    one = draws(capsys, "panoptic-maps", "a.png", "--model", models["with"])
    assert draws(capsys, "panoptic-maps", "a.png", "b.png", "--model", models["with"])[1] > 1.8 * one[1]
    two = ["--model", models["with"], "--model", f"none={models['without']}"]
    assert draws(capsys, "panoptic-maps", "a.png", *two)[0] > 1.4 * one[0]


def test_without_recalibration_there_is_no_figure(capsys, models):
    arguments = ["recalibration", "a.png", "--model", models["without"], "--output", "r.png"]
    assert "no token recalibration" in fails(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["token-similarity", "nothing.png", "--output", "f.png"], "there is no file nothing.png"),
        (["token-similarity", "results.csv", "--output", "f.png"], "not an image"),
        (["panoptic-maps", "a.png", "--model", "nowhere/at/all", "--output", "f.png"], "there is no folder"),
        (["compute-distribution", "nowhere/at/all", "--size", "64x64", "--output", "f.png"], "there is no preset"),
        (
            ["compute-distribution", "results.csv", "--size", "64x64", "--output", "f.png"],
            "results.csv has no configuration that can be",
        ),
        (["cost-and-quality", "a.png", "--output", "f.png"], "cannot read the results in a.png"),
        (["cost-and-quality", "results.csv", "--baseline", "x", "--output", "f.png"], "there are old, new"),
    ],
)
def test_failures(capsys, arguments, message):
    assert message in fails(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: NAME"),
        (["pie"], "invalid choice: 'pie'"),
        (["recalibration", "a.png"], "required: --output"),
        (["recalibration", "--output", "f.png"], "required: IMAGE"),
        (["recalibration", "a.png", "--output", "f.gif"], "picture format"),
        (["recalibration", "a.png", "--output", "no/f.png"], "there is no folder no"),
        (["recalibration", "a.png", "--output", "a.png"], "a.png is read and to be written"),
        (["recalibration", "a.png", "--device", "nowhere", "--output", "f.png"], "cannot put the model on nowhere"),
        (["token-similarity", "a.png", "--distance", "0", "--output", "f.png"], "0 is too few"),
        (["compute-distribution", "demo", "--output", "f.png"], "required: --size"),
        (
            ["compute-distribution", "demo", "demo", "--size", "64x64", "--output", "f.png"],
            "two models are called demo",
        ),
    ],
)
def test_wrong_command_lines(capsys, arguments, message):
    assert message in fails(capsys, *arguments, exit_code=2)


def test_without_matplotlib(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "proscale_hf.paper.figures"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = fails(capsys, "cost-and-quality", "results.csv", "--output", "f.png")
    assert line.startswith("error: matplotlib") and 'pip install "proscale-hf[figures]"' in line
