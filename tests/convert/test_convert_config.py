"""What a detectron2 configuration means for the model and the image processor."""

import os
from itertools import pairwise

import pytest

from detectron2_zoo import DEVIATION, IMAGE_MODELS, MEAN, VIDEO_MODELS, Published, Swin, write_configuration
from proscale_hf import ProScaleMask2FormerConfig
from proscale_hf.convert import ConversionError
from proscale_hf.convert.detectron2_config import (
    dataset_of,
    image_processor_settings,
    model_settings,
    read_config,
    reads_bgr,
)
from proscale_hf.data.categories import load_categories


HEAD = """
MODEL:
  META_ARCHITECTURE: MaskFormer
  MASK_FORMER: {TRANSFORMER_IN_FEATURE: multi_scale_pixel_decoder, NHEADS: 4, DEC_LAYERS: 10}
  SEM_SEG_HEAD:
    NAME: MaskFormerHead
    IN_FEATURES: [res2, res3, res4, res5]
    PIXEL_DECODER_NAME: PROSCALE
  BACKBONE: {NAME: D2SwinTransformer}
"""


def config(tmp_path, text="", head=HEAD):
    (tmp_path / "head.yaml").write_text(head)
    (tmp_path / "config.yaml").write_text("_BASE_: head.yaml\n" + text)
    return read_config(tmp_path / "config.yaml")


def test_originals_defaults(tmp_path):
    settings = model_settings(config(tmp_path))
    expected = {
        "encoder": "proscale",
        "encoder_stage_layers": [1, 1, 1],
        "num_attention_heads": 4,
        "encoder_num_points": 4,
        "token_recalibration": "linear",
        "token_recalibration_layout": "original",
        "pixel_embedding": "maxpool",
        "decoder_layers": 10,
        "mask_weight": 20.0,
        "mask_padding": False,
        "num_labels": 54,
    }
    assert {name: settings[name] for name in expected} == expected
    assert settings["backbone_config"]["num_heads"] == [3, 6, 12, 24]
    assert settings["backbone_config"]["image_size"] == 224
    assert reads_bgr(config(tmp_path))


@pytest.mark.parametrize(
    ("value", "expected"),
    [("null", "none"), ("None", "none"), ("''", "none"), ("False", "linear"), ("True", "conv")],
)
def test_token_recalibration(tmp_path, value, expected):
    settings = model_settings(config(tmp_path, f"MODEL: {{PROSCALE: {{IS_EXCITE_CONV: {value}}}}}"))
    assert settings["token_recalibration"] == expected


def test_mask2former(tmp_path):
    head = "{PIXEL_DECODER_NAME: MSDeformAttnPixelDecoder, TRANSFORMER_ENC_LAYERS: 6}"
    settings = model_settings(config(tmp_path, f"MODEL: {{SEM_SEG_HEAD: {head}}}"))
    expected = {"encoder": "mask2former", "encoder_layers": 6, "token_recalibration": "none"}
    assert {name: settings[name] for name in expected} == expected
    assert settings["pixel_embedding"] == "conv"


@pytest.mark.parametrize(
    ("depth", "layer_type", "depths"),
    [(18, "basic", [2, 2, 2, 2]), (50, "bottleneck", [3, 4, 6, 3]), (101, "bottleneck", [3, 4, 23, 3])],
)
def test_resnet(tmp_path, depth, layer_type, depths):
    resnet = f"{{DEPTH: {depth}, OUT_FEATURES: [res2, res3, res4, res5], NORM: SyncBN}}"
    settings = model_settings(
        config(tmp_path, f"MODEL: {{BACKBONE: {{NAME: build_resnet_backbone}}, RESNETS: {resnet}}}")
    )
    assert settings["backbone_config"]["depths"] == depths
    assert settings["backbone_config"]["layer_type"] == layer_type
    assert settings["backbone_config"]["hidden_sizes"] == [256, 512, 1024, 2048]
    assert settings["backbone_config"]["downsample_in_bottleneck"] is True
    assert settings["freeze_backbone_batch_norm"] is False


def test_image_processor(tmp_path):
    text = """
INPUT: {FORMAT: RGB, MIN_SIZE_TEST: 640, MAX_SIZE_TEST: 2560}
MODEL:
  PIXEL_MEAN: (51, 102.0, 153)
  PIXEL_STD: [25.5, 51, 255]
  MASK_FORMER: {SIZE_DIVISIBILITY: -1}
"""
    assert image_processor_settings(config(tmp_path, text)) == {
        "image_mean": [0.2, 0.4, 0.6],
        "image_std": [0.1, 0.2, 1.0],
        "do_resize": True,
        "size": {"shortest_edge": 640, "longest_edge": 2560},
        "size_divisor": 32,
        "ignore_index": 255,
        "top_k": 100,
    }
    fewer = config(tmp_path, text + "\nTEST: {DETECTIONS_PER_IMAGE: 30}")
    assert image_processor_settings(fewer)["top_k"] == 30
    blue_first = image_processor_settings(config(tmp_path, text.replace("RGB", "BGR")))
    assert (blue_first["image_mean"], blue_first["image_std"]) == ([0.6, 0.4, 0.2], [1.0, 0.2, 0.1])


def by_path(entries: list[Published]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", entries, ids=[entry.path.removesuffix(".yaml") for entry in entries])


@by_path(IMAGE_MODELS)
def test_every_published_model(tmp_path, entry):
    config = read_config(write_configuration(entry, tmp_path))
    architecture, folder = entry.architecture, entry.folder
    model = ProScaleMask2FormerConfig(**model_settings(config))

    swin = isinstance(architecture.backbone, Swin)
    trained_norm = (folder.backbone if swin else architecture.backbone).trained_norm
    expected = {
        "encoder": "mask2former",
        "encoder_layers": 6,
        "encoder_num_points": 4,
        "encoder_feedforward_dim": 1024,
        "token_recalibration": "none",
        "pixel_embedding": "conv",
        "stage_residual": False,
        "mask_padding": False,
        "freeze_backbone_batch_norm": swin or not trained_norm,
        "feature_size": 256,
        "mask_feature_size": 256,
        "hidden_dim": 256,
        "num_attention_heads": 8,
        "dim_feedforward": 2048,
        "decoder_layers": 10,
        "dropout": 0.0,
        "pre_norm": False,
        "enforce_input_projection": False,
        "num_labels": architecture.classes,
        "num_queries": architecture.queries,
        "ignore_value": folder.ignore,
        "use_auxiliary_loss": True,
        "no_object_weight": 0.1,
        "class_weight": 2.0,
        "mask_weight": 5.0,
        "dice_weight": 5.0,
        "train_num_points": 12544,
        "oversample_ratio": 3.0,
        "importance_sample_ratio": 0.75,
    }
    if entry.variant.proscale:
        del expected["encoder_layers"]
        expected |= {
            "encoder": "proscale",
            "encoder_stage_layers": [3, 3, 3],
            "token_recalibration": "linear",
            "token_recalibration_temperature": 0.1,
            "token_recalibration_layout": "original",
            "pixel_embedding": "maxpool",
        }
    assert {name: getattr(model, name) for name in expected} == expected
    assert_backbone(model.backbone_config, architecture.backbone)

    assert dataset_of(config) == folder.category_set
    assert not reads_bgr(config)
    processor = image_processor_settings(config)
    assert processor == {
        "image_mean": pytest.approx([value / 255 for value in MEAN]),
        "image_std": pytest.approx([value / 255 for value in DEVIATION]),
        "do_resize": True,
        "size": {"shortest_edge": entry.sizes[0], "longest_edge": entry.sizes[1]},
        "size_divisor": 32,
        "ignore_index": folder.ignore,
        "top_k": 100,
    }


def assert_backbone(config, backbone):
    if isinstance(backbone, Swin):
        expected = {
            "model_type": "swin",
            "embed_dim": backbone.embed_dim,
            "depths": list(backbone.depths),
            "num_heads": list(backbone.heads),
            "window_size": backbone.window,
            "image_size": backbone.image_size,
            "patch_size": 4,
            "mlp_ratio": 4.0,
            "qkv_bias": True,
            "drop_path_rate": 0.3,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "use_absolute_embeddings": False,
        }
    else:
        expected = {
            "model_type": "resnet",
            "depths": list(backbone.blocks),
            "layer_type": "bottleneck",
            "embedding_size": 64,
            "hidden_sizes": [256, 512, 1024, 2048],
            "downsample_in_bottleneck": False,
        }
    expected["out_features"] = ["stage1", "stage2", "stage3", "stage4"]
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("folder", {entry.path.rpartition("/")[0]: entry.folder for entry in IMAGE_MODELS}.values())
def test_category_sets_have_the_published_number_of_classes(folder):
    assert len(load_categories(folder.category_set)) == folder.classes


@by_path(VIDEO_MODELS)
def test_models_for_video(tmp_path, entry):
    config = read_config(write_configuration(entry, tmp_path))
    assert dataset_of(config) is None
    with pytest.raises(ConversionError, match=r"META_ARCHITECTURE is 'VideoMaskFormer'.*possible: 'MaskFormer'"):
        model_settings(config)


def test_base_files_are_no_models(tmp_path):
    entry = IMAGE_MODELS[0]
    path = write_configuration(entry, tmp_path).with_name(entry.folder.base)
    with pytest.raises(ConversionError, match="META_ARCHITECTURE is 'GeneralizedRCNN'"):
        model_settings(read_config(path))


@pytest.mark.parametrize(
    ("dataset", "category_set"),
    [
        ("coco_2017_train_panoptic_with_sem_seg", "coco_panoptic"),
        ("coco_2017_val_100_panoptic", "coco_panoptic"),
        ("coco_2014_valminusminival", "coco_instance"),
        ("ade20k_sem_seg_val", "ade20k_semantic"),
        ("coco_2017_train_panoptic_separated", None),  # things are one class there
        ("coco_2017_train_stuff_10k_sem_seg", None),
        ("keypoints_coco_2017_train", None),
        ("ade20k_full_sem_seg_train", None),
        ("my_cityscapes_fine_sem_seg_train", None),
        ("", None),
    ],
)
def test_data_sets(tmp_path, dataset, category_set):
    text = f"DATASETS: {{TRAIN: \"('{dataset}', 'coco_2017_train')\"}}"
    assert dataset_of(config(tmp_path, text)) == category_set


def test_no_data_set(tmp_path):
    assert dataset_of(config(tmp_path)) is None
    assert dataset_of(config(tmp_path, "DATASETS: {TRAIN: []}")) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {META_ARCHITECTURE: RetinaNet}", "META_ARCHITECTURE is 'RetinaNet'.*'MaskFormer'"),
        ("MODEL: {SEM_SEG_HEAD: {NAME: PerPixelBaselinePlusHead}}", "NAME is 'PerPixelBaselinePlusHead'"),
        ("MODEL: {SEM_SEG_HEAD: {PIXEL_DECODER_NAME: BasePixelDecoder}}", "NAME is 'BasePixelDecoder'"),
        ("MODEL: {SEM_SEG_HEAD: {PIXEL_DECODER_NAME: TransformerEncoderPixelDecoder}}", "NAME is 'TransformerEncoder"),
        ("MODEL: {MASK_FORMER: {TRANSFORMER_DECODER_NAME: StandardTransformerDecoder}}", "NAME is 'Standard"),
        ("MODEL: {MASK_FORMER: {TRANSFORMER_IN_FEATURE: res5}}", "FEATURE is 'res5'.*'multi_scale_pixel_decoder'"),
        ("MODEL: {BACKBONE: {NAME: build_resnet_deeplab_backbone}}", "NAME is 'build_resnet_deeplab_backbone'"),
        ("MODEL: {BACKBONE: {NAME: D2ViT}}", "NAME is 'D2ViT'.*'D2SwinTransformer', 'build_resnet_backbone'"),
        ("MODEL: {SEM_SEG_HEAD: {PIXEL_DECODER_NAME: X}}", "'X'.*'PROSCALE', 'MSDeformAttnPixelDecoder'"),
        ("MODEL: {PROSCALE: {MASK_OUTPUT_OPS: none}}", "OPS is 'none'.*'maxpool', 'avgpool', 'conv'"),
        ("MODEL: {PROSCALE: {IS_EXCITE_CONV: perhaps}}", "CONV must be of type bool, got 'perhaps'"),
        ("MODEL: {MASK_FORMER: {NHEADS: eight}}", "NHEADS must be of type int, got 'eight'"),
        ("MODEL: {MASK_FORMER: {NHEADS: null}}", "NHEADS must be of type int, got None"),
        ("MODEL: {MASK_FORMER: 3}", "MASK_FORMER.* must lie in a section"),
        ("MODEL: {SWIN: {DEPTHS: 2}}", "DEPTHS must be a list, got 2"),
        ("MODEL: {SWIN: {DEPTHS: [2, two]}}", "DEPTHS must be of type int, got 'two'"),
        ("MODEL: {SWIN: {APE: true}}", "APE is True"),
        ("MODEL: {SWIN: {QK_SCALE: [1]}}", "QK_SCALE is"),
        ("MODEL: {MASK_FORMER: {NHEADS: !!python/object/apply:eval ['8']}}", "NHEADS .* Python code"),
    ],
)
def test_impossible_values(tmp_path, text, message):
    with pytest.raises(ConversionError, match=message):
        model_settings(config(tmp_path, text))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("NUM_GROUPS: 32", "NUM_GROUPS is 32.*possible: 1"),
        ("WIDTH_PER_GROUP: 128", "WIDTH_PER_GROUP is 128.*possible: 64"),
        ("DEPTH: 20", "DEPTH is 20.*possible: 18, 34, 50, 101, 152"),
        ("NORM: GN", "NORM is 'GN'.*possible: 'FrozenBN', 'BN', 'SyncBN'"),
    ],
)
def test_impossible_resnet(tmp_path, entry, message):
    resnet = f"{{OUT_FEATURES: [res2, res3, res4, res5], {entry}}}"
    text = f"MODEL: {{BACKBONE: {{NAME: build_resnet_backbone}}, RESNETS: {resnet}}}"
    with pytest.raises(ConversionError, match=message):
        model_settings(config(tmp_path, text))


def test_python_in_values_that_are_not_read(tmp_path):
    """Configurations for ADE20K and Cityscapes compute training sizes this way."""
    marker = tmp_path / "marker"
    code = f"!!python/object/apply:eval [\"open('{marker}', 'w')\"]"
    model_settings(config(tmp_path, f"INPUT: {{MIN_SIZE_TRAIN: {code}, CROP: !!python/tuple [1, 2]}}"))
    assert not marker.exists()


def test_base_chain(tmp_path):
    """Later files win, sections are merged, lists are replaced; `..` is fine inside the tree."""
    tree = tmp_path / "configs" / "coco" / "swin"
    tree.mkdir(parents=True)
    (tmp_path / "configs" / "root.yaml").write_text("MODEL: {SWIN: {EMBED_DIM: 1, WINDOW_SIZE: 2, DEPTHS: [1, 1]}}")
    (tmp_path / "configs" / "coco" / "middle.yaml").write_text(
        "_BASE_: ../root.yaml\nMODEL: {SWIN: {EMBED_DIM: 3, DEPTHS: [4]}}"
    )
    (tree / "config.yaml").write_text("_BASE_: ../middle.yaml\nMODEL: {SWIN: {WINDOW_SIZE: 5}}")
    merged = read_config(tree / "config.yaml")
    assert merged["MODEL.SWIN.EMBED_DIM"] == 3
    assert merged["MODEL.SWIN.WINDOW_SIZE"] == 5
    assert merged["MODEL.SWIN.DEPTHS"] == (4,)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("{folder}/other.yaml", "relative"),
        ("~/other.yaml", "relative"),
        ("https://example.com/other.yaml", "relative"),
        ("detectron2://other.yaml", "relative"),
        ("3", "relative"),
        ("../../other.yaml", "leaves"),
        (r'"a\0b"', "has a _BASE_ that is no possible path"),
        (r'"\ud800"', "has a _BASE_ that is no possible path"),
        ("link.yaml", "leaves"),
        ("config.yaml", "based on itself: config.yaml -> config.yaml"),
        ("cycle.yaml", "based on itself: config.yaml -> cycle.yaml -> config.yaml"),
        ("missing.yaml", "there is no configuration .*missing.yaml"),
    ],
)
def test_impossible_base(tmp_path, base, message):
    (tmp_path / "other.yaml").write_text("MODEL: {}")
    folder = tmp_path / "project" / "folder"
    folder.mkdir(parents=True)
    (folder / "link.yaml").symlink_to(tmp_path / "other.yaml")
    (folder / "cycle.yaml").write_text("_BASE_: config.yaml")
    (folder / "config.yaml").write_text(f"_BASE_: [{base.format(folder=tmp_path)}]")
    with pytest.raises(ConversionError, match=message):
        read_config(folder / "config.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"MODEL:\n  A: [1\n", r"no valid YAML: line 3: expected"),
        (b"\x80\x02}q\x00.", "no valid YAML"),
        (b"A: !!python/object/new:os.system [1", "no valid YAML"),
        (b"[" * 2000, "no valid YAML"),
        (b"MODEL: {SWIN: {DEPTHS: 2000-99-99}}", "no valid YAML: month must be in"),
        (b"- 1", "no configuration"),
        (b"", "no configuration"),
    ],
)
def test_other_files(tmp_path, content, message):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        read_config(tmp_path / "config.yaml")


def test_values_that_grow(tmp_path):
    """Short texts for long values make neither long messages nor much work."""
    laughs = "a: &a [lol]\n" + "".join(
        f"{name}: &{name} [{','.join([f'*{below}'] * 9)}]\n" for below, name in pairwise("abcde")
    )
    (tmp_path / "config.yaml").write_text(f"{laughs}MODEL: *e\n")
    with pytest.raises(ConversionError, match="must lie in a section") as error:
        model_settings(read_config(tmp_path / "config.yaml"))
    assert len(str(error.value)) < 300
    for text in ("DROPOUT: '0x" + "F" * 800 + "'", "DROPOUT: '" + "9" * 900 + "'", "NHEADS: '" + "[" * 900 + "'"):
        with pytest.raises(ConversionError, match="must be of type") as error:
            model_settings(config(tmp_path, f"MODEL: {{MASK_FORMER: {{{text}}}}}"))
        assert len(str(error.value)) < 300


def test_very_many_bases(tmp_path):
    (tmp_path / "base.yaml").write_text("MODEL: {}")
    (tmp_path / "fan.yaml").write_text(f"_BASE_: [{'base.yaml, ' * 40}]")
    for number in range(40):
        (tmp_path / f"{number}.yaml").write_text(f"_BASE_: {number + 1}.yaml")
    for name in ("fan", "0"):
        with pytest.raises(ConversionError, match=r"starts from more than 30 files by _BASE_"):
            read_config(tmp_path / f"{name}.yaml")


def test_a_pipe_is_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "config.yaml").write_text("_BASE_: pipe.yaml")
    with pytest.raises(ConversionError, match=r"pipe\.yaml is a device or pipe, not a configuration"):
        read_config(tmp_path / "config.yaml")
