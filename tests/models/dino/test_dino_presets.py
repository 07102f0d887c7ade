"""Detection's configurations by name."""

import pytest

from proscale_hf import ProScaleDinoConfig
from proscale_hf.models.dino.presets import ARCHITECTURES, NAMES, NUM_LABELS, STAGES, is_preset, preset_settings


def test_there_is_every_name_once():
    names = list(NAMES)
    assert {"dino-r50-coco", "proscale-dino-r50-coco", "dino-swin-l-22k-coco"} <= set(names)
    assert len(names) == len(set(names)) == (len(ARCHITECTURES) + len(STAGES)) * len(NAMES.backbones) * len(NUM_LABELS)
    assert all(is_preset(name) for name in names)
    assert not is_preset("dino-r50-coco-1111") and not is_preset("proscale-r50-coco")


@pytest.mark.parametrize(
    ("name", "encoder", "strides", "stages"),
    [
        ("proscale-dino-r50-coco", "proscale", (64, 32, 16, 8), [3, 3, 3, 3]),
        ("proscale-dino-swin-t-coco-3331", "proscale", (64, 32, 16, 8), [3, 3, 3, 1]),
        ("dino-5scale-r50-coco", "dino", (64, 32, 16, 8, 4), [3, 3, 3, 3, 3]),
        ("lite-dino-mvitv2-t-coco", "lite", (64, 32, 16, 8), [3, 3, 3, 3]),
    ],
)
def test_a_preset_is_a_configuration(name, encoder, strides, stages):
    config = ProScaleDinoConfig.from_preset(name, num_queries=300)
    assert (config.encoder, config.encoder_strides, list(config.encoder_stage_layers)) == (encoder, strides, stages)
    assert (config.num_labels, config.num_queries, config.batch_padding) == (80, 300, "per_image")
    maps = getattr(config.backbone_config, "out_features", None) or config.backbone_config.out_indices
    assert len(maps) == len(config.feature_strides)


def test_settings_are_the_callers_own():
    preset_settings("dino-5scale-r50-coco")["feature_strides"].append(64)
    assert preset_settings("dino-5scale-r50-coco")["feature_strides"] == [4, 8, 16, 32]


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"no preset 'dino-r50-cocoo'.*dino-r50-coco"):
        ProScaleDinoConfig.from_preset("dino-r50-cocoo")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "rt"}, "`encoder` must be one of 'proscale', 'dino', 'lite', got 'rt'"),
        ({"batch_padding": "none"}, "`batch_padding` must be one of"),
        ({"num_feature_levels": 2}, "`num_feature_levels` must be at least 3"),
        ({"encoder_stage_layers": (3, 3, 3)}, "`encoder_stage_layers` must be 4 numbers"),
        ({"feature_size": 100}, "`feature_size` .100. must be a multiple of 32"),
        ({"focal_alpha": 1.5}, "`focal_alpha` must lie between 0 and 1"),
        ({"position_temperature": 0.0}, "`position_temperature` must be a number above 0"),
        ({"num_queries": 0}, "`num_queries` must be at least 1"),
    ],
)
def test_impossible_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ProScaleDinoConfig(**changes)
