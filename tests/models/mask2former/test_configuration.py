"""The configuration: defaults, refusals that say what is possible, and saving."""

import pytest
from transformers import AutoConfig, Mask2FormerConfig, ResNetConfig, SwinConfig

from helpers import tiny_config
from proscale_hf import ProScaleMask2FormerConfig
from proscale_hf.encoders.configuration import EncoderConfig


def test_defaults_are_the_papers_swin_tiny_model():
    config = ProScaleMask2FormerConfig()
    assert config.encoder == "proscale" and tuple(config.encoder_stage_layers) == (3, 3, 3)
    assert config.token_recalibration == "linear" and config.token_recalibration_temperature == 0.1
    assert config.pixel_embedding == "maxpool"
    assert config.backbone_config.model_type == "swin" and config.backbone_config.depths == [2, 2, 6, 2]
    assert config.hidden_size == config.hidden_dim == 256
    assert config.encoder_strides == (32, 16, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "deformable"}, "'proscale', 'mask2former', 'lite', 'rt'.*'deformable'"),
        ({"encoder": "lite", "feature_strides": (4, 8), "encoder_stage_layers": (1,)}, "at least two strides"),
        ({"token_recalibration": True}, "token_recalibration"),
        ({"token_recalibration": "mlp"}, "'none', 'linear', 'conv'"),
        ({"token_recalibration_layout": "transposed"}, "'paper', 'original'"),
        ({"pixel_embedding": "minpool"}, "'maxpool', 'avgpool', 'conv', 'none'"),
        ({"encoder_stage_layers": (3, 3)}, "3 numbers"),
        ({"encoder_stage_layers": (3, 0, 3)}, "at least 1"),
        ({"feature_size": 48}, "multiple of 32"),
        ({"hidden_dim": 30}, "multiple of 4"),
        ({"num_attention_heads": 5}, "multiple of 5"),
        ({"hidden_dim": 2, "num_attention_heads": 1}, "multiple of 4"),
        ({"num_queries": 0}, "at least 1"),
        ({"oversample_ratio": 0.5}, "at least 1"),
        ({"dropout": 1.5}, "between 0 and 1"),
        ({"feature_strides": (8, 16, 32)}, "common_stride"),
        ({"feature_strides": ()}, "common_stride"),
        ({"decoder_layers": 1}, "at least 2"),
        ({"activation_function": "nope"}, "'relu'"),
        ({"ignore_value": 1}, "between 2 and 255"),
        ({"mask_weight": float("nan")}, "at least 0"),
        ({"no_object_weight": -0.1}, "at least 0"),
        ({"backbone_config": {"embed_dim": 8}}, "model_type"),
        ({"backbone_config": {"model_type": "no-such"}}, "no-such"),
        ({"num_queries": 10**12}, "`num_queries` must be at most 1,048,576 in size"),
        ({"num_labels": 10**12}, "`num_labels` must be at most"),
        ({"decoder_layers": 2000}, "asks for 2,0.. layers; at most 1,000"),
        ({"backbone_config": {"model_type": "swin", "depths": [2, 2, 900, 900]}}, "asks for 1,8.. layers"),
        ({"backbone_config": {"model_type": "swin", "num_labels": 10**12}}, "`num_labels` must be at most"),
        ({"backbone_config": {"model_type": "swin", "embed_dim": 2**40}}, "`embed_dim` must be at most"),
        ({"categories": []}, "at least one entry"),
        ({"categories": [{"id": 1}]}, r"`name` of `categories\[0\]`"),
        ({"categories": [{"id": -1, "name": "cat"}]}, "from 0 to 2147483647, got -1"),
        ({"categories": [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]}, "`id` 1 occurs 2 times"),
        ({"categories": [{"id": 1, "name": "cat", "isthing": 3}]}, "0 or 1, got 3"),
        ({"categories": [{"id": 1, "name": "cat", "color": [0, 0, 256]}]}, "from 0 to 255"),
    ],
)
def test_what_is_not_possible_is_refused(change, message):
    with pytest.raises(Exception, match=message) as error:
        tiny_config(**change)
    if change.get("token_recalibration") is not True:  # a wrong type is the typed dataclass's own error
        assert isinstance(error.value, ValueError) and "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{}, {"encoder": "mask2former", "id2label": {0: "a", 1: "b"}}])
def test_saved_and_loaded_is_the_same(tmp_path, changes):
    if "id2label" in changes:
        changes = {**changes, "num_labels": 2}
    config = tiny_config(**changes)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ProScaleMask2FormerConfig
    left, right = config.to_dict(), loaded.to_dict()
    for volatile in ("transformers_version", "_name_or_path"):
        left.pop(volatile, None), right.pop(volatile, None)
    assert {k: v for k, v in left.items() if not isinstance(v, tuple)} == {
        k: v for k, v in right.items() if not isinstance(left[k], tuple)
    }


def test_without_a_map_for_the_per_pixel_embedding_alone_all_are_the_encoders():
    config = tiny_config(pixel_embedding="none", common_stride=8, feature_strides=(8, 16, 32))
    assert config.encoder_strides == (32, 16, 8)


def test_a_configuration_of_mask2former_can_be_read(tmp_path):
    Mask2FormerConfig(num_queries=11).save_pretrained(tmp_path)
    config = ProScaleMask2FormerConfig.from_pretrained(tmp_path, encoder="mask2former")
    assert config.num_queries == 11 and config.encoder == "mask2former"


def test_backbone_config_is_shared():
    backbone = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    assert ProScaleMask2FormerConfig(backbone_config=backbone).backbone_config is backbone


def test_attention_implementation_reaches_the_backbone():
    config = tiny_config(attn_implementation="eager")
    assert isinstance(config.backbone_config, SwinConfig)
    assert config.backbone_config._attn_implementation == "eager"


def test_number_of_labels():
    assert tiny_config(num_labels=5).id2label == {i: f"LABEL_{i}" for i in range(5)}


CATEGORIES = [
    {"id": 17, "name": "cat", "isthing": 1, "color": [255, 77, 255]},
    {"id": 200, "name": "rug", "isthing": 0},
    {"id": 0, "name": "dog"},
]
NAMES = {0: "cat", 1: "rug", 2: "dog"}


def test_categories_are_saved_and_found_by_label(tmp_path):
    tiny_config(categories=CATEGORIES, id2label=NAMES, num_labels=3).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.categories == CATEGORIES
    assert [config.category(label_id) for label_id in range(3)] == CATEGORIES
    assert config.category(3) is config.category(-1) is config.category(-9) is None


def test_no_categories():
    config = tiny_config()
    assert config.categories is None and config.category(0) is None


def test_categories_of_other_labels_are_passed_over(tmp_path, caplog):
    tiny_config(categories=CATEGORIES, id2label=NAMES, num_labels=3).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, id2label={0: "cat", 1: "bird"})
    assert [config.category(label_id) for label_id in range(4)] == [CATEGORIES[0], None, None, None]
    assert caplog.records == []
    config = AutoConfig.from_pretrained(tmp_path, num_labels=2)
    assert [config.category(label_id) for label_id in range(3)] == [None] * 3
    config.id2label = NAMES
    assert config.category(1) == CATEGORIES[1]


def test_what_is_stuff_follows_the_labels():
    """Own labels are things, whatever the categories of the checkpoint said of the labels in their place."""
    settings = {"categories": CATEGORIES, "num_labels": 3}
    assert tiny_config(**settings, id2label=NAMES).stuff_label_ids([0]) == [1]
    assert tiny_config(**settings, id2label={0: "cell", 1: "nucleus", 2: "dog"}).stuff_label_ids([0]) == []
    assert tiny_config(id2label=NAMES).stuff_label_ids() is None
    assert tiny_config(id2label=NAMES).stuff_label_ids([0]) == [0]
    nobody_says = [{"id": 1, "name": "cat"}, {"id": 2, "name": "rug"}]
    assert tiny_config(categories=nobody_says, id2label={0: "cat", 1: "rug"}).stuff_label_ids() is None


def test_a_default_configuration_logs_nothing(capfd):
    ProScaleMask2FormerConfig()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("config_class", [ProScaleMask2FormerConfig, EncoderConfig])
def test_every_field_is_documented(config_class):
    own = set(vars(config_class)["__annotations__"])
    assert own and all(f"{name} (" in config_class.__doc__ for name in own)
