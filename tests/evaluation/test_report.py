"""The report of an evaluation."""

import json

import pytest

from evaluation_data import CATEGORIES
from proscale_hf.evaluation.report import to_markdown, write_report


def quality(value: float, **more) -> dict:
    return {"pq": value, "sq": 1.0, "rq": value, **more}


@pytest.fixture
def report() -> dict:
    return {
        "command": "proscale evaluate --model m",
        "model": "m",
        "versions": {"torch": "9.9", "processes": "2"},
        "categories": CATEGORIES,
        "panoptic": {
            "All": quality(0.5282, n=4),
            "Things": quality(0.25, n=2),
            "Stuff": quality(0.75, n=2),
            "per_class": {"7": quality(0.5), "3": quality(0.0), "90": quality(0.125), "12": quality(1.0)},
        },
        "instance": {"AP": 0.4, "AP50": 0.61, "per_class": {"7": 0.8, "3": -1.0}},
        "semantic": {"mIoU": 0.6, "per_class": {"7": 0.1, "3": 0.2, "90": None, "12": 0.4}},
        "images": 5,
        "skipped": [],
        "seconds": 2.0,
        "images_per_second": 2.5,
    }


def cells(markdown: str, first: str) -> list[str]:
    """The cells of the row that begins with a text."""
    [line] = [line for line in markdown.splitlines() if line.startswith(f"| {first} |")]
    return line.strip("| ").split(" | ")


def test_the_papers_columns_in_percent(report):
    text = to_markdown(report)
    assert text.startswith("`proscale evaluate --model m`\n\ntorch 9.9, processes 2\n\n| model ")
    row = dict(zip(cells(text, "model"), cells(text, "`m`"), strict=True))
    assert row == {
        "model": "`m`",
        "PQ": "52.8",
        "SQ": "100.0",
        "RQ": "52.8",
        "PQ things": "25.0",
        "PQ stuff": "75.0",
        "AP": "40.0",
        "AP50": "61.0",
        "mIoU": "60.0",
        "images": "5",
        "images/s": "2.50",
    }


def test_each_class_has_a_row(report):
    text = to_markdown(report)
    assert cells(text, "class") == ["class", "kind", "PQ", "SQ", "RQ", "AP", "IoU"]
    assert cells(text, "cat") == ["cat", "thing", "50.0", "100.0", "50.0", "80.0", "10.0"]
    assert cells(text, "dog") == ["dog", "thing", "0.0", "100.0", "0.0", "-", "20.0"]
    assert cells(text, "grass") == ["grass", "stuff", "12.5", "100.0", "12.5", "-", "-"]


def test_only_what_was_measured(report):
    del report["panoptic"], report["semantic"]
    text = to_markdown(report)
    assert cells(text, "model") == ["model", "AP", "AP50", "images", "images/s"]
    assert cells(text, "class") == ["class", "kind", "AP"]


def test_what_was_left_out_is_named(report):
    assert "left out" not in to_markdown(report)
    report["skipped"] = ["a.png is damaged", "b.png is empty"]
    text = to_markdown(report)
    assert "2 images were left out:\n\n- a.png is damaged\n- b.png is empty\n" in text


def test_names_cannot_break_the_table(report):
    report["categories"] = [{**CATEGORIES[0], "name": "cat | lion\n"}]
    assert cells(to_markdown(report), r"cat \| lion")[1] == "thing"


def test_files(report, tmp_path):
    write_report(report, tmp_path)
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert content["panoptic"]["All"]["pq"] == 0.5282
    assert content["semantic"]["per_class"]["90"] is None
    assert (tmp_path / "results.md").read_text() == to_markdown(report)
