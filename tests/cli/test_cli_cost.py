"""`proscale cost` in each of its formats, and its errors in one line."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from helpers import tiny_config, tiny_detection_config
from paths import ROOT
from proscale_hf import ProScaleMask2FormerConfig
from proscale_hf.cli import main
from proscale_hf.cost import measure_cost
from proscale_hf.paper import tables as paper_tables


DEMO_MODEL = str(ROOT / "proscale_hf" / "demo_model")


def test_json_of_a_preset(capsys):
    assert main(["cost", "--preset", "proscale-swin-t-coco", "--size", "800x1333", "--format", "json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["total_gflops"] == pytest.approx(214.15, rel=0.005)  # the original's, counted with fvcore
    assert record["parameters_millions"] == pytest.approx(48.82, rel=0.005)
    stages = ("backbone_gflops", "encoder_gflops", "mask_decoder_gflops", "post_processing_gflops")
    assert sum(record[stage] for stage in stages) == pytest.approx(record["total_gflops"])
    assert (record["model"], record["height"], record["width"]) == ("proscale-swin-t-coco", 800, 1333)


def test_several_sizes_make_a_list_and_a_line_each(capsys):
    command = ["cost", "--preset", "rt-r50-coco", "--size", "64x96", "96x64", "--format"]
    assert main([*command, "json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [(record["height"], record["width"]) for record in records] == [(64, 96), (96, 64)]
    assert main([*command, "csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [{key: str(value) for key, value in record.items()} for record in records] == lines


def test_table(capsys):
    assert main(["cost", "--model", DEMO_MODEL, "--size", "128x128"]) == 0
    output = capsys.readouterr().out
    cost = measure_cost(ProScaleMask2FormerConfig.from_pretrained(DEMO_MODEL), 128, 128)
    assert f"| 128 x 128 | {cost.total_gflops:.2f} | {cost.backbone_gflops:.2f} |" in output
    assert f"{cost.parameters_millions:.2f} M parameters" in output
    assert "multiply-adds" in output


def test_detection_has_stages_of_its_own(capsys, tmp_path):
    tiny_detection_config().save_pretrained(tmp_path)
    for source in (["--preset", "dino-r50-coco"], ["--model", str(tmp_path)]):
        assert main(["cost", *source, "--size", "64x96"]) == 0
        lines = capsys.readouterr().out.splitlines()
        [titles] = [line.split(" | ") for line in lines if line.startswith("| size")]
        assert titles[1:7] == ["total", "backbone", "projections", "encoder", "query selection", "decoder"]
        [numbers] = [line.strip("| ").split(" | ") for line in lines if line.startswith("| 64 x 96")]
        assert sum(map(float, numbers[2:7])) == pytest.approx(float(numbers[1]), abs=0.03)


def test_config_file(capsys, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    path = str(tmp_path / "config.json")
    assert main(["cost", "--config", path, "--size", "64x64", "--format", "json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == {"model": path, "height": 64, "width": 64, **asdict(measure_cost(tiny_config(), 64, 64))}


def test_paper_tables(capsys, monkeypatch, tmp_path):
    """With the first two rows, which hold one of each kind."""
    content = json.loads(paper_tables.TABLES_FILE.read_text())
    rows = content["tables"][0]["rows"]
    content["tables"] = [{**content["tables"][0], "rows": [rows[1], rows[8]]}]
    shortened = tmp_path / "tables.json"
    shortened.write_text(json.dumps(content))
    monkeypatch.setattr(paper_tables, "TABLES_FILE", shortened)
    assert main(["cost", "--paper-tables"]) == 0
    assert (
        "| COCO, Swin-T | Lite-M2F | `lite-swin-t-coco` | 52.70 | 188.00 | 189.19 | +0.6 % |" in capsys.readouterr().out
    )
    assert main(["cost", "--paper-tables", "--format", "json"]) == 0
    lite, pem = json.loads(capsys.readouterr().out)
    assert lite["paper_encoder_gflops"] == 79.78 and lite["encoder_width"] == 1200 and lite["width"] == 1067
    assert pem["model"] == "PEM" and pem["total_gflops"] is None
    assert main(["cost", "--paper-tables", "--format", "csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "one of the arguments --model --config --preset --paper-tables is required"),
        (["--preset", "proscale-swin-t-coko"], 2, "nearest names are proscale-swin-t-coco"),
        (["--preset", "rt-r50-coco", "--config", "config.json"], 2, "not allowed with"),
        (["--preset", "rt-r50-coco", "--size", "800"], 2, "HEIGHTxWIDTH"),
        (["--preset", "rt-r50-coco", "--size", "0x64"], 2, "too few"),
        (["--preset", "rt-r50-coco", "--size", "64x-64"], 2, "'64x-64' is not HEIGHTxWIDTH"),
        (["--preset", "rt-r50-coco", "--size", "800x"], 2, "'800x' is not HEIGHTxWIDTH"),
        (["--preset", "rt-r50-coco", "--size", "900000000x900000000"], 1, "cannot run at 900000000 x 900000000"),
        (["--config", "nowhere.json"], 2, "there is no file nowhere.json"),
        (["--config", __file__], 1, "has no configuration that can be loaded"),
        (["--paper-tables", "--size", "64x64"], 2, "leave --size out"),
    ],
)
def test_errors_are_one_line(arguments, status, message, capsys):
    assert main(["cost", *arguments]) == status
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_a_missing_library_is_named(capsys, monkeypatch):
    """As without timm: transformers' backbone then refuses."""

    def refuse(*_):
        raise ImportError("TimmBackbone requires the timm library.\nInstall it.", name="timm")

    monkeypatch.setattr("proscale_hf.cost.measure_cost", refuse)
    assert main(["cost", "--preset", "proscale-mvitv2-t-coco"]) == 1
    assert capsys.readouterr().err == 'error: timm is not installed: pip install "proscale-hf[timm]"\n'


def test_a_configuration_of_another_model_is_one_line(tmp_path):
    """transformers would say something of its own, on a standard error that tests do not see."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    command = [sys.executable, "-m", "proscale_hf", "cost", "--config", str(tmp_path / "config.json")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and result.stderr.endswith("its model_type is bert\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_written_is_one_line():
    command = [sys.executable, "-m", "proscale_hf", "cost", "--model", DEMO_MODEL, "--size", "64x64"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: [Errno 28] No space left on device"  # behind what is being done
