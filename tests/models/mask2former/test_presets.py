"""Configurations by name: as the originals' files say, and the caller's own."""

import json

import pytest
import torch

from paths import ROOT
from proscale_hf import ProScaleMask2FormerConfig, ProScaleMask2FormerForUniversalSegmentation
from proscale_hf.backbones.presets import BACKBONES
from proscale_hf.hub.names import MODEL_NAMES
from proscale_hf.models.mask2former.presets import (
    ARCHITECTURES,
    NUM_LABELS,
    STAGES,
    is_preset,
    preset_names,
    preset_settings,
)


ZOO = json.loads((ROOT / "proscale_hf" / "hub" / "model_zoo.json").read_text())
# what a published model keeps to the original's ways in, and a new one does not
PARITY_FIELDS = {"mask_padding", "token_recalibration_layout", "ignore_value"}


def test_every_published_model_has_a_preset_that_names_all():
    assert set(MODEL_NAMES) <= set(preset_names())
    assert {"mask2former-swin-t-coco", "proscale-swin-t-coco"} <= set(preset_names())


def test_there_is_every_name_once():
    names = preset_names()
    assert len(names) == len(set(names)) == (len(ARCHITECTURES) + len(STAGES)) * len(BACKBONES) * len(NUM_LABELS)
    assert all(is_preset(name) for name in names)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (
            "rt-mvitv2-t-ade20k-semantic",
            {
                "encoder": "rt",
                "pixel_embedding": "none",
                "token_recalibration": "none",
                "common_stride": 8,
                "feature_strides": [8, 16, 32],
                "backbone_config": {"model_type": "timm_backbone", "backbone": "mvitv2_tiny", "out_indices": [1, 2, 3]},
                "num_labels": 150,
            },
        ),
        (
            "lite-lpe-r101-cityscapes-instance",
            {
                "encoder": "lite",
                "pixel_embedding": "maxpool",
                "token_recalibration": "none",
                "backbone_config": BACKBONES["r101"],
                "freeze_backbone_batch_norm": False,
                "num_labels": 8,
            },
        ),
        (
            "proscale-swin-l-22k-mapillary-vistas-131",
            {
                "encoder_stage_layers": [1, 3, 1],
                "backbone_config": BACKBONES["swin-l-22k"],
                "num_queries": 200,
                "num_labels": 65,
            },
        ),
        (
            "proscale-swin-l-22k-coco-instance",
            {"backbone_config": BACKBONES["swin-l-22k"], "num_queries": 200, "num_labels": 80},
        ),
        ("proscale-swin-b-22k-ade20k-semantic", {"backbone_config": BACKBONES["swin-b"], "num_labels": 150}),
    ],
)
def test_names_with_parts_that_look_alike(name, settings):
    assert preset_settings(name) == settings


@pytest.mark.parametrize(
    "name",
    ["", "proscale", "lite-lpe-coco", "rt-swin-t-coco-111", "proscale-swin-t-coco-", "proscale-swin-t-coco\n", None],
)
def test_other_names_are_no_presets(name):
    assert not is_preset(name)
    with pytest.raises(ValueError, match="no preset"):
        preset_settings(name)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_presets_say_what_the_originals_configurations_say(name, tmp_path):
    pytest.importorskip("yaml")
    from detectron2_zoo import IMAGE_MODELS, write_configuration
    from proscale_hf.convert.detectron2_config import model_settings, read_config

    path = next(model["config"] for model in ZOO["models"] if model["name"] == name)
    entry = next(entry for entry in IMAGE_MODELS if path.endswith(str(entry.path)))
    original = ProScaleMask2FormerConfig(**model_settings(read_config(write_configuration(entry, tmp_path)))).to_dict()
    preset = ProScaleMask2FormerConfig.from_preset(name).to_dict()
    assert {field for field in original if original[field] != preset[field]} <= PARITY_FIELDS


@pytest.mark.parametrize("architecture", ["proscale", "mask2former", "lite", "lite-lpe", "rt"])
@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_every_architecture_goes_with_every_backbone(architecture, backbone):
    if backbone == "mvitv2-t":
        pytest.importorskip("timm")
    with torch.device("meta"):
        config = ProScaleMask2FormerConfig.from_preset(f"{architecture}-{backbone}-coco")
        model = ProScaleMask2FormerForUniversalSegmentation._from_config(config)
    pixel_values = torch.zeros((1, 3, 64, 96), device="meta")
    maps = model.model.pixel_level_module.encoder(pixel_values).feature_maps
    assert [m.shape[-2:] for m in maps] == [(64 // s, 96 // s) for s in config.feature_strides]


def test_default_configuration_is_the_papers_model():
    preset = ProScaleMask2FormerConfig.from_preset("proscale-swin-t-coco")
    assert ProScaleMask2FormerConfig(num_labels=133).to_dict() == preset.to_dict()


def test_numbers_of_layers():
    assert ProScaleMask2FormerConfig.from_preset("proscale-r50-coco-113").encoder_stage_layers == [1, 1, 3]
    assert tuple(ProScaleMask2FormerConfig.from_preset("proscale-r50-coco").encoder_stage_layers) == (3, 3, 3)


def test_changes_win():
    config = ProScaleMask2FormerConfig.from_preset("proscale-swin-t-coco", num_labels=7, num_queries=20)
    assert (len(config.id2label), config.num_queries) == (7, 20)
    with pytest.raises(ValueError, match="num_queries"):
        ProScaleMask2FormerConfig.from_preset("proscale-swin-t-coco", num_queries=0)


def test_a_configuration_does_not_share_with_the_table():
    config = ProScaleMask2FormerConfig.from_preset("proscale-swin-t-coco-111")
    config.backbone_config.depths.append(1)
    config.encoder_stage_layers.append(1)
    default = ProScaleMask2FormerConfig()
    default.backbone_config.depths.append(1)
    assert BACKBONES["swin-t"]["depths"] == [2, 2, 6, 2]
    assert preset_settings("proscale-swin-t-coco-111")["encoder_stage_layers"] == [1, 1, 1]
    rt = ProScaleMask2FormerConfig.from_preset("rt-r50-coco")
    rt.feature_strides.append(64)
    rt.backbone_config.out_features.append("stage5")
    assert preset_settings("rt-r50-coco")["feature_strides"] == [8, 16, 32]
    assert BACKBONES["r50"]["out_features"] == ["stage1", "stage2", "stage3", "stage4"]


@pytest.mark.parametrize("name", ["proscal-swin-t-coco", "Proscale-Swin-T-COCO", "proscale-swin-t-coco-112"])
def test_an_unknown_name_is_refused_with_the_nearest(name):
    with pytest.raises(ValueError, match=r"no preset .*proscale-swin-t-coco(-11[13])?[,.]") as error:
        ProScaleMask2FormerConfig.from_preset(name)
    assert "\n" not in str(error.value)
