"""Our figures against the paper's, and the page that shows them."""

import json

import pytest

from paths import ROOT
from proscale_hf import ProScaleMask2FormerConfig
from proscale_hf.cost import measure_cost
from proscale_hf.models.mask2former.presets import preset_settings
from proscale_hf.paper.tables import TABLES_FILE, PaperRow, paper_rows, to_markdown


ENTRIES = [
    (table["table"], entry) for table in json.loads(TABLES_FILE.read_text())["tables"] for entry in table["rows"]
]


@pytest.fixture(scope="module")
def rows() -> list[PaperRow]:
    pytest.importorskip("timm")
    return list(paper_rows())


def test_all_tables_are_there():
    assert [sum(table == number for table, _ in ENTRIES) for number in range(1, 8)] == [15, 13, 0, 4, 6, 10, 8]


@pytest.mark.parametrize(("table", "entry"), [pair for pair in ENTRIES if "preset" in pair[1]])
def test_presets_are_what_the_rows_are_about(table, entry):
    preset, settings = entry["preset"], preset_settings(entry["preset"])
    names = {"Swin-T": "swin-t", "Swin-S": "swin-s", "Swin-B": "swin-b-22k", "Swin-L": "swin-l-22k"}
    names |= {"ResNet-50": "r50", "ResNet-101": "r101", "MViTv2-T": "mvitv2-t"}
    assert f"-{names[entry['backbone']]}-{entry['dataset']}" in preset
    stages = tuple(settings.get("encoder_stage_layers", (3, 3, 3)))
    models = {
        "mask2former": "Mask2Former",
        "proscale": f"PRO-SCALE {stages}",
        "lite": "Lite-M2F" + (" + LPE" if settings.get("pixel_embedding") == "maxpool" else ""),
        "rt": "RT-M2F",
    }
    assert entry["model"] == models[settings.get("encoder", "proscale")]


def test_one_model_has_the_same_figures_in_all_tables():
    figures: dict[str, set] = {}
    for _, entry in ENTRIES:
        if "preset" in entry:
            figures.setdefault(entry["preset"], set()).add((entry["total_gflops"], entry["encoder_gflops"]))
    assert all(len(values) == 1 for values in figures.values())


@pytest.mark.slow
def test_our_figures_are_the_papers(rows):
    """Totals for COCO are averages over images in the paper, of one size here."""
    counted = [row for row in rows if row.preset is not None]
    assert len(counted) == 48
    for row in counted:
        assert abs(row.total_difference) < (0.026 if row.dataset == "coco" else 0.007), row
        assert -0.003 < row.encoder_difference < 0.018, row
        assert row.total_difference == pytest.approx(row.total_gflops / row.paper_total_gflops - 1)


@pytest.mark.slow
def test_what_is_not_in_the_package_has_no_figures_of_ours(rows):
    others = [row for row in rows if row.preset is None]
    assert {row.model for row in others} == {"MaskFormer", "PEM", "YOSO", "RAP-SAM", "ReMaX"}
    assert all(row.total_gflops is None and row.encoder_difference is None for row in others)
    assert "| COCO, ResNet-50 | PEM |  | 46.38 | 110.90 |  |  |  |  |  |" in to_markdown(rows)


@pytest.mark.slow
def test_the_page_is_current():
    pytest.importorskip("timm")
    from paper_page import PAGE, parts, written

    text = PAGE.read_text()
    assert text == written(text, parts()), "run python tests/paper_page.py"


def test_what_the_page_says_about_other_tables_and_figures():
    """Table 3, the cost of recalibration, and figures 1 and 4."""

    def cost(preset: str, size: tuple[int, int], **changes):
        return measure_cost(ProScaleMask2FormerConfig.from_preset(preset, **changes), *size)

    coco, cityscapes = (800, 1067), (1024, 2048)
    without_s1 = {key: preset_settings("rt-swin-t-cityscapes")[key] for key in ("backbone_config", "feature_strides")}
    without_s1 |= {"pixel_embedding": "none", "common_stride": 8}
    c1 = cost("mask2former-swin-t-cityscapes", cityscapes, **without_s1).encoder_gflops
    c2 = cost("proscale-swin-t-cityscapes-111", cityscapes, pixel_embedding="conv").encoder_gflops
    shares = [
        f"{m.encoder_gflops / m.total_gflops:.1%}".replace("%", " %")
        for m in (cost(f"mask2former-{backbone}-coco", coco) for backbone in ("r50", "swin-t"))
    ]
    model = cost("proscale-swin-t-coco", coco)
    recalibration = model.total_gflops - cost("proscale-swin-t-coco", coco, token_recalibration="none").total_gflops
    convolution = cost("proscale-swin-t-coco", coco, pixel_embedding="conv").encoder_gflops
    page = (ROOT / "docs" / "paper.md").read_text()
    assert f"costs {c1:.1f}." in page and f"costs {c2:.1f}." in page
    assert f"| {shares[0]}, {shares[1]} |" in page
    assert f"| 0.006 | {recalibration:.3f} |" in page
    assert f"| {1 - model.encoder_gflops / convolution:.0%} less |".replace("%", " %") in page
