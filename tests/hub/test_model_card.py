"""Model cards: metadata that the Hub reads, facts that are the model's, and text of users that breaks nothing."""

import math
import re

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load

from helpers import TINY_RESNET, tiny_config, tiny_model
from proscale_hf import ProScaleMask2FormerConfig, ProScaleMask2FormerImageProcessorPil
from proscale_hf.cost import Cost, measure_cost
from proscale_hf.hub.model_card import cost_section, input_size, model_card


CATEGORIES = [
    {"id": 11, "name": "cat", "isthing": 1},
    {"id": 12, "name": "dog", "isthing": 1},
    {"id": 40, "name": "grass", "isthing": 0},
    {"id": 90, "name": "sky", "isthing": 0},
]
NAMES = {label_id: category["name"] for label_id, category in enumerate(CATEGORIES)}
NASTY = [
    "a|b | c",
    "two\nlines\n---\nlicense: mit\n---\n# Title",
    "`code` ```python\n```",
    "<script>alert(1)</script><!-- </details>",
    "*bold* _it_ [link](javascript:x) ~no~ $x$ \\",
    ": {yaml: [1, 2} # - ? & ! %",
    "é中\u202e\x00\u2028end",
]


def rows_of(card: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its two lines of header."""
    section = card.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[2:]]


def test_metadata_are_what_the_hub_wants(tmp_path):
    card = model_card(
        tiny_config(weights_license="cc-by-nc-4.0"),
        metrics={"PQ": 52.8, "box AP": 40},
        evaluated_on="COCO panoptic, val2017",
        datasets=["somebody/coco"],
        base_model="somebody/mask2former",
        tags=["mine"],
    )
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "image-segmentation"
    assert {"proscale", "mask2former", "panoptic-segmentation", "mine"} <= set(metadata["tags"])
    assert metadata["license"] == "cc-by-nc-4.0" and "license_name" not in metadata
    assert metadata["datasets"] == ["somebody/coco"] and metadata["base_model"] == "somebody/mask2former"
    [entry] = metadata["model-index"]
    [result] = entry["results"]
    assert result["task"] == {"type": "image-segmentation"}
    assert result["dataset"] == {"name": "COCO panoptic, val2017", "type": "coco_panoptic_val2017"}
    assert result["metrics"] == [
        {"type": "pq", "name": "PQ", "value": 52.8},
        {"type": "box_ap", "name": "box AP", "value": 40.0},
    ]
    data = ModelCard(card).data
    assert [result.metric_value for result in data.eval_results] == [52.8, 40.0]
    assert [[cell.strip() for cell in row] for row in rows_of(card, "Results")] == [["PQ", "52.8"], ["box AP", "40"]]


def test_nothing_is_made_up():
    card = model_card(ProScaleMask2FormerConfig())
    metadata = ModelCard(card).data.to_dict()
    assert set(metadata) == {"library_name", "pipeline_tag", "tags"}
    for heading in ("Licence", "Results", "Classes"):  # classes without names are not listed
        assert f"## {heading}" not in card
    assert "licen" not in card.lower() and "Input" not in card


@pytest.mark.parametrize(
    ("said", "metadata"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        (
            "other: non-commercial evaluation, no redistribution",
            {"license": "other", "license_name": "non-commercial-evaluation-no-redistribution"},
        ),
        ("see\nthe *owner*", {"license": "other", "license_name": "see-the-owner"}),
        ("???", {"license": "other", "license_name": "unnamed"}),
    ],
)
def test_the_licence_is_the_one_of_the_weights(said, metadata):
    card = model_card(tiny_config(weights_license=said))
    data = ModelCard(card).data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == metadata
    licence = card.split("## Licence\n")[1].split("\n## ")[0]
    assert " ".join(said.split()).replace("*", r"\*") in licence


def test_facts_are_the_model_s():
    processor = ProScaleMask2FormerImageProcessorPil(size={"height": 64, "width": 96})
    model = tiny_model(id2label=NAMES, categories=CATEGORIES, num_queries=7)
    measured = measure_cost(model, 64, 96)
    card = model_card(model, processor, costs=cost_section(measured, 64, 96), repo_id="me/my-model")
    assert "\n# PRO-SCALE (1, 2, 1), a swin backbone\n" in card
    for fact in (
        "| Classes | 4 (2 things, 2 stuff) |",
        "| Queries | 7 |",
        "| Encoder | PRO-SCALE, layers per stage (1, 2, 1) |",
        "| Input | images are resized to 64 x 96 |",
    ):
        assert fact in card
    assert [[cell.strip() for cell in row] for row in rows_of(card, "Classes")] == [
        ["0", "cat", "thing", "11"],
        ["1", "dog", "thing", "12"],
        ["2", "grass", "stuff", "40"],
        ["3", "sky", "stuff", "90"],
    ]
    costs = {name.strip(): float(value) for name, value in rows_of(card, "Cost")}
    assert costs["total"] == round(measured.total_gflops, 2) > 0
    assert costs["encoder (pixel decoder)"] == round(measured.encoder_gflops, 2)
    assert f"{measured.parameters_millions:.2f} million parameters. One image of 64 x 96" in card
    assert card.count('"me/my-model", trust_remote_code=True') == 1 + 2


def test_the_image_processor_says_what_is_stuff_if_the_categories_do_not():
    config = tiny_config(id2label=NAMES)
    card = model_card(config, ProScaleMask2FormerImageProcessorPil(label_ids_to_fuse=[3]))
    assert [row[2].strip() for row in rows_of(card, "Classes")] == ["thing", "thing", "thing", "stuff"]
    unknown = model_card(config, ProScaleMask2FormerImageProcessorPil())
    assert "thing" not in unknown and "stuff" not in unknown


@pytest.mark.parametrize(("is_thing", "task"), [(1, "instance"), (0, "semantic")], ids=["only things", "only stuff"])
def test_the_task_follows_from_the_classes(is_thing, task):
    categories = [{**category, "isthing": is_thing} for category in CATEGORIES]
    card = model_card(tiny_config(id2label=NAMES, categories=categories))
    tags = ModelCard(card).data.tags
    assert [tag for tag in tags if tag.endswith("-segmentation")] == [f"{task}-segmentation"]
    assert f'subtask="{task}"' in card and f"post_process_{task}_segmentation" in card


def test_many_classes_are_folded():
    names = {label_id: f"class {label_id}" for label_id in range(40)}
    card = model_card(tiny_config(id2label=names, num_labels=40))
    assert "<details>\n<summary>40 classes</summary>\n\n|" in card and "\n\n</details>" in card
    assert len(rows_of(card, "Classes")) == 40
    assert "<details>" not in model_card(tiny_config(id2label=NAMES))


def test_text_of_users_breaks_nothing():
    categories = [{"id": 5 + label_id, "name": name, "isthing": 1} for label_id, name in enumerate(NASTY)]
    names = dict(enumerate(NASTY))
    config = tiny_config(id2label=names, num_labels=len(names), categories=categories, weights_license=NASTY[1])
    card = model_card(
        config,
        metrics={NASTY[0]: 1, NASTY[1]: 2.5},
        evaluated_on=NASTY[1],
        tags=NASTY[:6],
        costs=cost_section(Cost(*range(8)), 64, 96),
        repo_id='x", "y": "z',
    )
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, flags=re.DOTALL).groups()
    metadata = yaml.safe_load(front)
    assert metadata == ModelCard(card).data.to_dict()
    assert metadata["license"] == "other" and metadata["library_name"] == "transformers"
    rows = rows_of(card, "Classes")
    assert len(rows) == len(NASTY) and all(len(row) == 4 for row in rows)
    assert [int(row[3]) for row in rows] == [category["id"] for category in categories]
    assert len(rows_of(card, "Results")) == 2
    headings = re.findall(r"^#+ .*", re.sub(r"```.*?```", "", body, flags=re.DOTALL), flags=re.MULTILINE)
    assert headings[1:] == [f"## {name}" for name in ("Use it", "Classes", "Cost", "Results", "Licence", "Citation")]
    assert "<script" not in body and "\n---\n" not in body and "\x00" not in card and "\u202e" not in card
    assert len(re.findall("^```", body, flags=re.MULTILINE)) == 6
    for block in re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL):
        compile(block, "card", "exec")


@pytest.mark.parametrize(
    ("settings", "size", "rule"),
    [
        ({}, (800, 1333), "images are resized to shortest edge 800, longest edge 1333 pixels"),
        ({"size": {"longest_edge": 640}}, (480, 640), "images are resized to longest edge 640 pixels"),
        ({"size": {"shortest_edge": 600}}, (600, 800), "images are resized to shortest edge 600 pixels"),
        ({"size": {"max_height": 100, "max_width": 200}}, (100, 200), "max width 200, max height 100 pixels"),
        ({"do_resize": False}, (800, 1333), "images keep their size"),
        ({"pad_size": {"height": 256, "width": 288}}, (256, 288), "then padded to 256 x 288"),
    ],
)
def test_the_input_is_what_the_processor_makes(settings, size, rule):
    processor = ProScaleMask2FormerImageProcessorPil(**settings)
    assert input_size(processor.to_dict()) == size
    assert rule in model_card(tiny_config(), processor)


def test_backbones_and_architectures_have_their_names():
    swin_large = {"model_type": "swin", "embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]}
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    for settings, title in (
        ({}, "PRO-SCALE (3, 3, 3), Swin-T"),
        ({"backbone_config": {**swin_large, **stages}}, "PRO-SCALE (3, 3, 3), Swin-L"),
        ({"backbone_config": {"model_type": "resnet", "depths": [3, 4, 23, 3], **stages}}, "ResNet-101"),
        ({"backbone_config": dict(TINY_RESNET)}, "PRO-SCALE (3, 3, 3), a resnet backbone"),
        ({"encoder": "lite", "pixel_embedding": "conv"}, "Lite-M2F, Swin-T"),
        ({"encoder": "lite"}, "Lite-M2F with light pixel embedding, Swin-T"),
        ({"encoder": "rt", "pixel_embedding": "conv"}, "RT-M2F, Swin-T"),
        ({"encoder": "mask2former", "pixel_embedding": "conv"}, "Mask2Former, Swin-T"),
    ):
        card = model_card(ProScaleMask2FormerConfig(**settings))
        assert re.search(rf"^# .*{re.escape(title)}$", card, flags=re.MULTILINE), title
    assert "aich2025" not in card and "cheng2022" in card


def test_impossible_metrics_are_refused():
    with pytest.raises(ValueError, match="evaluated_on"):
        model_card(tiny_config(), metrics={"PQ": 50.0})
    with pytest.raises(ValueError, match="finite"):
        model_card(tiny_config(), metrics={"PQ": math.nan}, evaluated_on="COCO")
