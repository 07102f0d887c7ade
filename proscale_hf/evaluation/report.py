"""What an evaluation found: a Markdown table with the paper's columns for people, JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from proscale_hf.files.whole import write_whole


MEASURES = {
    "PQ": ("panoptic", "All", "pq"),
    "SQ": ("panoptic", "All", "sq"),
    "RQ": ("panoptic", "All", "rq"),
    "PQ things": ("panoptic", "Things", "pq"),
    "PQ stuff": ("panoptic", "Stuff", "pq"),
    "AP": ("instance", "AP"),
    "AP50": ("instance", "AP50"),
    "mIoU": ("semantic", "mIoU"),
}
CLASS_MEASURES = {
    "PQ": ("panoptic", "per_class", "{id}", "pq"),
    "SQ": ("panoptic", "per_class", "{id}", "sq"),
    "RQ": ("panoptic", "per_class", "{id}", "rq"),
    "AP": ("instance", "per_class", "{id}"),
    "IoU": ("semantic", "per_class", "{id}"),
}


def to_markdown(report: Mapping[str, Any]) -> str:
    """
    Args:
        report: the results of `evaluate`, and "command", "model", "versions" (texts by name) and "categories" (the data
            set's, in label order).

    Returns:
        Command and versions, a row for the model, a row for each class, and the images that were left out. Measures are
        in percent; "-" stands where nothing could be measured.
    """
    names = [name for name, keys in MEASURES.items() if keys[0] in report]
    speed = f"{report['images_per_second']:.2f}"
    row = [f"`{report['model']}`", *(percent(report, MEASURES[name]) for name in names), report["images"], speed]
    class_names = [name for name, keys in CLASS_MEASURES.items() if keys[0] in report]
    class_rows = []
    for category in report["categories"]:
        paths = [[key.format(id=category["id"]) for key in CLASS_MEASURES[name]] for name in class_names]
        kind = "thing" if category["isthing"] else "stuff"
        class_rows.append([category["name"], kind, *(percent(report, path) for path in paths)])
    parts = [
        f"`{report['command']}`",
        ", ".join(f"{name} {value}" for name, value in report["versions"].items()),
        table(["model", *names, "images", "images/s"], [row]),
        table(["class", "kind", *class_names], class_rows),
    ]
    if report["skipped"]:
        parts.append(f"{len(report['skipped'])} images were left out:")
        parts.append("\n".join(f"- {line}" for line in report["skipped"]))
    return "\n\n".join(parts) + "\n"


def percent(report: Mapping[str, Any], path: Sequence[str]) -> str:
    """The value at the end of a path of keys, as `"52.0"`; "-" if there is none."""
    value = reduce(lambda level, key: {} if level is None else level.get(key), path, report)
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"  # AP is -1 where there is no object to find


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [[cell(value) for value in row] for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """A text that stays inside its cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write `results.json` (everything, unrounded; where nothing could be measured, AP is -1 and IoU null) and
    `results.md`.

    Raises:
        ValueError: they cannot be written.
    """
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    write_whole(folder / "results.json", lambda file: file.write(text.encode()))
    write_whole(folder / "results.md", lambda file: file.write(to_markdown(report).encode()))
