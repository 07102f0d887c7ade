"""The costs in the paper's tables 1, 2 and 4 to 7 (`paper/tables.json`) beside those counted here (`cost.py`).

The paper's figures are averages over images. A single size stands for them: 1024 x 2048 for Cityscapes, whose images
all have it, and 800 x 1067 for COCO. Some of the encoder's figures for COCO are those of 800 x 1200 instead:
`encoder_image` in the file marks them.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proscale_hf.cost import measure_cost
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig


TABLES_FILE = Path(__file__).with_name("tables.json")
DATASET_NAMES = {"coco": "COCO", "cityscapes": "Cityscapes"}
HEADER = """| data, backbone | model | preset | PQ: paper | total: paper | here | | encoder: paper | here | |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""
NOTES = """GFLOPs of one image, of COCO at 800 x 1067 and of Cityscapes at 1024 x 2048. The percentage behind
each of our figures says by how much it exceeds the paper's. \\*: at 800 x 1200, as the paper's figure. Models without a
preset are not in this package. PQ is not reproduced."""


@dataclass(frozen=True)
class PaperRow:
    """
    One row of a table.

    Attributes:
        table: its number in the paper.
        dataset: "coco" or "cityscapes".
        backbone: such as "Swin-T".
        model: such as "PRO-SCALE (3, 3, 3)".
        preset: the model's name here; None if it is not in this package.
        pq: panoptic quality that the paper reports, in percent.
        miou: mean intersection over union that the paper reports; None where it does not.
        ap: average precision that the paper reports; None where it does not.
        height: of the image that the total is counted for here.
        width: as `height`.
        paper_total_gflops: the paper's.
        total_gflops: counted here; None without a preset.
        total_difference: 0.01 if `total_gflops` is 1 % above the paper's; None without a preset.
        encoder_height: of the image that the encoder is counted for here.
        encoder_width: as `encoder_height`.
        paper_encoder_gflops: the paper's; None where it has none.
        encoder_gflops: counted here; None without a preset.
        encoder_difference: as `total_difference`.
    """

    table: int
    dataset: str
    backbone: str
    model: str
    preset: str | None
    pq: float
    miou: float | None
    ap: float | None
    height: int
    width: int
    paper_total_gflops: float
    total_gflops: float | None
    total_difference: float | None
    encoder_height: int
    encoder_width: int
    paper_encoder_gflops: float | None
    encoder_gflops: float | None
    encoder_difference: float | None


def paper_rows() -> Iterator[PaperRow]:
    """The rows in the paper's order. Each model is counted when its row's turn comes, in about half a second.

    Raises:
        ImportError: timm, which one of the backbones comes from, is not installed.
    """
    content = _read_file()
    for table in content["tables"]:
        for entry in table["rows"]:
            yield _row(table["table"], entry, content["images"][entry["dataset"]])


def _read_file() -> dict[str, Any]:
    return json.loads(TABLES_FILE.read_text(encoding="utf-8"))


def _row(table: int, entry: dict[str, Any], image: Sequence[int]) -> PaperRow:
    encoder_image = entry.get("encoder_image", image)
    total = encoder = total_difference = encoder_difference = None
    if "preset" in entry:
        config = ProScaleMask2FormerConfig.from_preset(entry["preset"])
        total = measure_cost(config, *image).total_gflops
        encoder = measure_cost(config, *encoder_image).encoder_gflops
        total_difference = total / entry["total_gflops"] - 1
        encoder_difference = encoder / entry["encoder_gflops"] - 1
    return PaperRow(
        table=table,
        dataset=entry["dataset"],
        backbone=entry["backbone"],
        model=entry["model"],
        preset=entry.get("preset"),
        pq=entry["PQ"],
        miou=entry.get("mIoU"),
        ap=entry.get("AP"),
        height=image[0],
        width=image[1],
        paper_total_gflops=entry["total_gflops"],
        total_gflops=total,
        total_difference=total_difference,
        encoder_height=encoder_image[0],
        encoder_width=encoder_image[1],
        paper_encoder_gflops=entry.get("encoder_gflops"),
        encoder_gflops=encoder,
        encoder_difference=encoder_difference,
    )


def to_markdown(rows: Sequence[PaperRow]) -> str:
    """A Markdown table for each table of the paper, with notes below."""
    lines = []
    for table in _read_file()["tables"]:
        members = [row for row in rows if row.table == table["table"]]
        lines += [f"### Table {table['table']}: {table['title']}", "", HEADER, *map(_to_line, members), ""]
    return "\n".join([*lines, NOTES])


def _to_line(row: PaperRow) -> str:
    mark = "" if (row.encoder_height, row.encoder_width) == (row.height, row.width) else "\\*"
    cells = (
        f"{DATASET_NAMES[row.dataset]}, {row.backbone}",
        row.model,
        "" if row.preset is None else f"`{row.preset}`",
        _number(row.pq),
        _number(row.paper_total_gflops),
        _number(row.total_gflops),
        _percent(row.total_difference),
        _number(row.paper_encoder_gflops),
        _number(row.encoder_gflops) + mark,
        _percent(row.encoder_difference),
    )
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1%}".replace("%", " %")
