"""`proscale choose`: the table, the JSON, and one line where nothing fits."""

import json

import pytest

from helpers import tiny_config
from proscale_hf.benchmarking.choosing import ForwardTimer, count_costs
from proscale_hf.cli import main


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch) -> str:
    """A small configuration in the current folder, and an untouched Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tiny_config().save_pretrained("tiny")
    return "tiny"


def fails(capsys, *arguments: str, exit_code: int = 1) -> str:
    """Runs a command that must fail with one line; returns that line."""
    assert main(["choose", *arguments]) == exit_code
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
    return output.err


def test_table(capsys, config):
    limit = count_costs(tiny_config(), 64, 96, 2)[1, 1, 2][0]
    assert main(["choose", "--gflops", str(limit * 1.0001), "--size", "64x96", "--config", config]) == 0
    output = capsys.readouterr()
    rows = [line for line in output.out.splitlines() if line.startswith("| (")]
    assert rows[0].endswith(" | full |") and not rows[-1].endswith("full |")
    assert any(line.startswith("| (1, 1, 2) |") for line in rows)
    assert "torch " in output.out and "dtype float32" in output.out
    assert output.err.startswith("timing ") and output.err.count("\n") == 1


def test_long_tables_end(capsys, config, monkeypatch):
    monkeypatch.setattr(ForwardTimer, "milliseconds", lambda *_: 10.0)
    assert main(["choose", "--gflops", "100", "--size", "64x96", "--config", config]) == 0
    output = capsys.readouterr().out
    assert len([line for line in output.splitlines() if line.startswith("| (")]) == 20
    assert "and 44 more" in output and "| ~ 10 ms |  |  |" in output


def test_json(capsys, config):
    arguments = ["--milliseconds", "100000", "--size", "64x96", "--config", config, "--max-layers", "2"]
    assert main(["choose", *arguments, "--labels", "9", "--timed", "1", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["height"], found["width"], found["gflops"], found["milliseconds"]) == (64, 96, None, 100000)
    assert len(found["choices"]) == 8
    best = found["choices"][0]
    assert best["encoder_stage_layers"] == [2, 2, 2] and best["is_full"]
    assert best["total_gflops"] == count_costs(tiny_config(num_labels=9), 64, 96, 2)[2, 2, 2][0]
    assert [choice["spread"] is None for choice in found["choices"]].count(
        False
    ) == 5  # and those that the estimates are made from


def test_the_smallest_cost_is_told(capsys):
    """Swin-T at COCO's size: the figure of the original code."""
    line = fails(capsys, "--gflops", "160", "--size", "800x1333")
    assert "nothing fits 160 GFLOPs at 800 x 1333: the smallest, (1, 1, 1), takes 172.4" in line


def test_the_smallest_time_is_told(capsys, config, monkeypatch):
    monkeypatch.setattr(ForwardTimer, "milliseconds", lambda *_: 10.0)
    assert main(["choose", "--milliseconds", "1", "--size", "64x96", "--config", config]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "the smallest, (1, 1, 1), takes 10 ms" in lines[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give a budget: --gflops, --milliseconds or both"),
        (["--gflops", "0"], "'0' is not a possible budget"),
        (["--gflops", "many"], "'many' is not a possible budget"),
        (["--milliseconds", "nan"], "'nan' is not a possible budget"),
        (["--gflops", "9", "--size", "800x"], "'800x' is not HEIGHTxWIDTH"),
        (["--gflops", "9", "--size", "8x9"], "'8x9' must have sides of 32 to 8192 pixels"),
        (["--gflops", "9", "--backbone", "alexnet"], "invalid choice: 'alexnet'"),
        (["--gflops", "9", "--backbone", "r50", "--config", "tiny"], "not allowed with"),
        (["--gflops", "9", "--labels", "0"], "0 is too few"),
    ],
)
def test_wrong_command_lines(capsys, arguments, message):
    assert message in fails(capsys, *arguments, exit_code=2)


def test_configurations_that_cannot_be_chosen_from(capsys):
    tiny_config(encoder="mask2former").save_pretrained("other")
    assert "only the encoder 'proscale'" in fails(capsys, "--gflops", "9", "--config", "other")
    assert "there is no preset nowhere/to/be" in fails(capsys, "--gflops", "9", "--config", "nowhere/to/be")
    assert "1 to 12" in fails(capsys, "--gflops", "9", "--config", "tiny", "--max-layers", "99")
