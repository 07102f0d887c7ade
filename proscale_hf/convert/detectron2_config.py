"""Translates a detectron2 configuration into settings of this package's model and image processor.

A file is either a full dump or a few lines on top of a chain of `_BASE_` files. Entries that none of them has get the
default of detectron2, Mask2Former or PRO-SCALE. Values for which this package has no model are refused.
"""

import ast
import contextlib
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from proscale_hf.convert import ConversionError
from proscale_hf.files.reading import reading
from proscale_hf.files.text import shown
from proscale_hf.files.yaml_text import Chain, PlainLoader, read_yaml


BASE_KEY = "_BASE_"
CONFIG_ROOT_NAME = "configs"  # what detectron2 projects call the folder of all their configurations
LONGEST_LITERAL = 1000  # characters of a Python value in a text
LONGEST_INTEGER = 1000  # bits of a number that Python has a float for

# The entries that are read, with the originals' defaults, whose types are the entries' types.
DEFAULTS: dict[str, Any] = {
    "DATASETS.TRAIN": ("",),
    "INPUT.FORMAT": "BGR",
    "INPUT.MAX_SIZE_TEST": 1333,
    "INPUT.MIN_SIZE_TEST": 800,
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.MASK_FORMER.CLASS_WEIGHT": 1.0,
    "MODEL.MASK_FORMER.DEC_LAYERS": 6,
    "MODEL.MASK_FORMER.DEEP_SUPERVISION": True,
    "MODEL.MASK_FORMER.DICE_WEIGHT": 1.0,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 2048,
    "MODEL.MASK_FORMER.DROPOUT": 0.1,
    "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": False,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 256,
    "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO": 0.75,
    "MODEL.MASK_FORMER.MASK_WEIGHT": 20.0,
    "MODEL.MASK_FORMER.NHEADS": 8,
    "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": 0.1,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 100,
    "MODEL.MASK_FORMER.OVERSAMPLE_RATIO": 3.0,
    "MODEL.MASK_FORMER.PRE_NORM": False,
    "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": 32,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 12544,
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": "MultiScaleMaskedTransformerDecoder",
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "res5",
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.PIXEL_MEAN": (103.53, 116.28, 123.675),
    "MODEL.PIXEL_STD": (1.0, 1.0, 1.0),
    "MODEL.PROSCALE.EXCITE_TEMP": 1.0,
    "MODEL.PROSCALE.IS_EXCITE_CONV": False,
    "MODEL.PROSCALE.MASK_OUTPUT_OPS": "maxpool",
    "MODEL.PROSCALE.PROSCALE_NUM_LAYERS": (1, 1, 1),
    "MODEL.PROSCALE.RESIDUAL": False,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": (False, False, False, False),
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.RESNETS.NUM_GROUPS": 1,
    "MODEL.RESNETS.OUT_FEATURES": ("res4",),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
    "MODEL.RESNETS.RES5_DILATION": 1,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 4,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 128,
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": ("res3", "res4", "res5"),
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": 255,
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ("p2", "p3", "p4", "p5"),
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 256,
    "MODEL.SEM_SEG_HEAD.NAME": "SemSegFPNHead",
    "MODEL.SEM_SEG_HEAD.NORM": "GN",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 54,
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BasePixelDecoder",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 0,
    "MODEL.SWIN.APE": False,
    "MODEL.SWIN.ATTN_DROP_RATE": 0.0,
    "MODEL.SWIN.DEPTHS": (2, 2, 6, 2),
    "MODEL.SWIN.DROP_PATH_RATE": 0.3,
    "MODEL.SWIN.DROP_RATE": 0.0,
    "MODEL.SWIN.EMBED_DIM": 96,
    "MODEL.SWIN.MLP_RATIO": 4.0,
    "MODEL.SWIN.NUM_HEADS": (3, 6, 12, 24),
    "MODEL.SWIN.OUT_FEATURES": ("res2", "res3", "res4", "res5"),
    "MODEL.SWIN.PATCH_NORM": True,
    "MODEL.SWIN.PATCH_SIZE": 4,
    "MODEL.SWIN.PRETRAIN_IMG_SIZE": 224,
    "MODEL.SWIN.QKV_BIAS": True,
    "MODEL.SWIN.QK_SCALE": None,
    "MODEL.SWIN.WINDOW_SIZE": 7,
    "TEST.DETECTIONS_PER_IMAGE": 100,
}
OPTIONAL = {"MODEL.PROSCALE.IS_EXCITE_CONV"}  # may also be None, or empty, which stands for None

RESNET_DEPTHS = {
    18: ("basic", [2, 2, 2, 2]),
    34: ("basic", [3, 4, 6, 3]),
    50: ("bottleneck", [3, 4, 6, 3]),
    101: ("bottleneck", [3, 4, 23, 3]),
    152: ("bottleneck", [3, 8, 36, 3]),
}

# Training sets that the originals register, as patterns, and the category sets that their labels are numbered by.
DATASETS = tuple(
    (re.compile(pattern), category_set)
    for pattern, category_set in (
        (r"coco_20(14|17)_(train|val|val_100|minival|valminusminival)", "coco_instance"),
        (r"coco_2017_(train|val|val_100)_panoptic(_with_sem_seg)?", "coco_panoptic"),
        (r"ade20k_instance_(train|val)", "ade20k_instance"),
        (r"ade20k_panoptic_(train|val)", "ade20k_panoptic"),
        (r"ade20k_sem_seg_(train|val)", "ade20k_semantic"),
        (r"cityscapes_fine_instance_seg_(train|val)", "cityscapes_instance"),
        (r"cityscapes_fine_(panoptic|sem_seg)_(train|val)", "cityscapes"),
        (r"mapillary_vistas_panoptic_(train|val)", "mapillary_vistas"),
        (r"mapillary_vistas_sem_seg_(train|val)", "mapillary_vistas_semantic"),
    )
)


class Detectron2Config:
    """
    A detectron2 configuration, read by dotted names: `config["MODEL.SWIN.EMBED_DIM"]`.

    Args:
        values: Nested mappings as in the file. What is absent has the originals' default.
    """

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def __getitem__(self, name: str) -> Any:
        default = DEFAULTS[name]
        value: Any = self.values
        for key in name.split("."):
            if not isinstance(value, Mapping):
                raise ConversionError(f"The configuration's {name} must lie in a section, but lies in {shown(value)}.")
            if key not in value:
                return default
            value = value[key]
        return _checked(name, value, default)

    def choose(self, name: str, choices: Mapping[Any, Any]) -> Any:
        """What the entry's value stands for; if it is no key of `choices`, `ConversionError` names the keys."""
        value = self[name]
        for choice, meaning in choices.items():
            if value == choice:
                return meaning
        valid = ", ".join(repr(choice) for choice in choices)
        raise ConversionError(f"{name} is {shown(value)}, which cannot be converted; possible: {valid}.")


def read_config(path: str | Path) -> Detectron2Config:
    """
    Read a configuration file and the chain of files it is based on.

    A `_BASE_` must be a relative path inside the configuration's tree: the outermost folder around the file
    that is called `configs`, or without one the folder above the file's.

    Args:
        path: YAML file. Tags that would run Python are not followed.

    Returns:
        The merged configuration.

    Raises:
        ConversionError: a file is missing, unreadable or no configuration, or a `_BASE_` leaves the tree or
            forms a cycle.
    """
    path = Path(path).resolve()
    roots = [folder for folder in path.parents if folder.name == CONFIG_ROOT_NAME]
    root = roots[-1] if roots else path.parent.parent
    chain = Chain(BASE_KEY, ConversionError)
    return Detectron2Config(chain.follow(path, partial(_read_chain, path, root, chain)))


def _read_chain(path: Path, root: Path, chain: Chain) -> dict[str, Any]:
    """A file's values, over those of the files that it is based on."""
    own = read_yaml(path, "configuration", ConversionError, ConfigLoader)
    if not isinstance(own, dict):
        raise ConversionError(f"{path} is no configuration: it must be a mapping of sections.")
    bases = own.pop(BASE_KEY, [])
    values: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or Path(base).is_absolute() or re.match(r"~|.*://", base):
            raise ConversionError(f"{path}: {BASE_KEY} must be a relative path, got {shown(base)}.")
        with reading(path, f"has a {BASE_KEY} that is no possible path", ConversionError):
            base_path = (path.parent / base).resolve()
        if not base_path.is_relative_to(root):
            raise ConversionError(f"{path}: {BASE_KEY} {shown(base)} leaves the configuration's folder {root}.")
        values = _merged(values, chain.follow(base_path, partial(_read_chain, base_path, root, chain)))
    return _merged(values, own)


class ConfigLoader(PlainLoader):
    """YAML's safe loader, which also reads over Python tags: detectron2 evaluates them, and this loader does not."""


class NotEvaluated:
    """Stands for a Python expression in a configuration file."""

    def __init__(self, tag: str):
        self.tag = tag

    def __repr__(self) -> str:
        return f"Python code (!!python/{self.tag})"


def _construct_python(loader: ConfigLoader, tag: str, node: yaml.Node) -> Any:
    return loader.construct_sequence(node, deep=True) if tag == "tuple" else NotEvaluated(tag)


ConfigLoader.add_multi_constructor("tag:yaml.org,2002:python/", _construct_python)


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(base)
    for key, value in own.items():
        both_sections = isinstance(value, Mapping) and isinstance(values.get(key), Mapping)
        values[key] = _merged(values[key], value) if both_sections else value
    return values


def _checked(name: str, value: Any, default: Any) -> Any:
    """The value with the type of the entry's default."""
    if isinstance(value, str) and not isinstance(default, str) and len(value) <= LONGEST_LITERAL:
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = ast.literal_eval(value)  # YAML takes "(1, 2)" and "None" for strings
    if default is None or (name in OPTIONAL and value in (None, "")):
        return value or None
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple):
            raise ConversionError(f"{name} must be a list, got {shown(value)}.")
        return tuple(_checked(name, item, default[0]) for item in value)
    if isinstance(default, float) and type(value) is int and value.bit_length() < LONGEST_INTEGER:
        return float(value)
    if type(value) is not type(default):
        raise ConversionError(f"{name} must be of type {type(default).__name__}, got {shown(value)}.")
    return value


def model_settings(config: Detectron2Config) -> dict[str, Any]:
    """
    Translate the entries about the model.

    Args:
        config: A Mask2Former or PRO-SCALE configuration.

    Returns:
        Keyword arguments for `ProScaleMask2FormerConfig`.

    Raises:
        ConversionError: an entry has a value that has no equivalent in this package.
    """
    config.choose("MODEL.META_ARCHITECTURE", {"MaskFormer": None})
    config.choose("MODEL.SEM_SEG_HEAD.NAME", {"MaskFormerHead": None})
    config.choose("MODEL.SEM_SEG_HEAD.NORM", {"GN": None})
    config.choose("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", {4: None})
    config.choose("MODEL.SEM_SEG_HEAD.IN_FEATURES", {("res2", "res3", "res4", "res5"): None})
    config.choose("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", {("res3", "res4", "res5"): None})
    config.choose("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", {"MultiScaleMaskedTransformerDecoder": None})
    config.choose("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", {"multi_scale_pixel_decoder": None})
    encoder_settings = config.choose(
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME",
        {"PROSCALE": _proscale_settings, "MSDeformAttnPixelDecoder": _mask2former_settings},
    )
    backbone_settings = config.choose(
        "MODEL.BACKBONE.NAME",
        {"D2SwinTransformer": _swin_settings, "build_resnet_backbone": _resnet_settings},
    )
    return {
        **backbone_settings(config),
        **encoder_settings(config),
        # The original's deformable encoder has the mask decoder's number of heads, four points and a width of
        # 1024, whatever DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS, ..._N_POINTS and DIM_FEEDFORWARD say.
        "encoder_num_points": 4,
        "encoder_feedforward_dim": 1024,
        "mask_padding": False,  # the original takes padding for image
        "feature_size": config["MODEL.SEM_SEG_HEAD.CONVS_DIM"],
        "mask_feature_size": config["MODEL.SEM_SEG_HEAD.MASK_DIM"],
        "ignore_value": config["MODEL.SEM_SEG_HEAD.IGNORE_VALUE"],
        "num_labels": config["MODEL.SEM_SEG_HEAD.NUM_CLASSES"],
        "hidden_dim": config["MODEL.MASK_FORMER.HIDDEN_DIM"],
        "num_attention_heads": config["MODEL.MASK_FORMER.NHEADS"],
        "dim_feedforward": config["MODEL.MASK_FORMER.DIM_FEEDFORWARD"],
        "decoder_layers": config["MODEL.MASK_FORMER.DEC_LAYERS"],
        "dropout": config["MODEL.MASK_FORMER.DROPOUT"],
        "pre_norm": config["MODEL.MASK_FORMER.PRE_NORM"],
        "enforce_input_projection": config["MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ"],
        "num_queries": config["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"],
        "use_auxiliary_loss": config["MODEL.MASK_FORMER.DEEP_SUPERVISION"],
        "no_object_weight": config["MODEL.MASK_FORMER.NO_OBJECT_WEIGHT"],
        "class_weight": config["MODEL.MASK_FORMER.CLASS_WEIGHT"],
        "mask_weight": config["MODEL.MASK_FORMER.MASK_WEIGHT"],
        "dice_weight": config["MODEL.MASK_FORMER.DICE_WEIGHT"],
        "train_num_points": config["MODEL.MASK_FORMER.TRAIN_NUM_POINTS"],
        "oversample_ratio": config["MODEL.MASK_FORMER.OVERSAMPLE_RATIO"],
        "importance_sample_ratio": config["MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO"],
    }


def _proscale_settings(config: Detectron2Config) -> dict[str, Any]:
    pixel_embeddings = {name: name for name in ("maxpool", "avgpool", "conv")}
    return {
        "encoder": "proscale",
        "encoder_stage_layers": list(config["MODEL.PROSCALE.PROSCALE_NUM_LAYERS"]),
        "stage_residual": config["MODEL.PROSCALE.RESIDUAL"],
        "token_recalibration": config.choose(
            "MODEL.PROSCALE.IS_EXCITE_CONV", {None: "none", False: "linear", True: "conv"}
        ),
        "token_recalibration_temperature": config["MODEL.PROSCALE.EXCITE_TEMP"],
        "token_recalibration_layout": "original",
        "pixel_embedding": config.choose("MODEL.PROSCALE.MASK_OUTPUT_OPS", pixel_embeddings),
    }


def _mask2former_settings(config: Detectron2Config) -> dict[str, Any]:
    return {
        "encoder": "mask2former",
        "encoder_layers": config["MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"],
        "token_recalibration": "none",
        "pixel_embedding": "conv",
    }


ALL_STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _swin_settings(config: Detectron2Config) -> dict[str, Any]:
    config.choose("MODEL.SWIN.APE", {False: None})
    config.choose("MODEL.SWIN.PATCH_NORM", {True: None})
    config.choose("MODEL.SWIN.QK_SCALE", {None: None})
    config.choose("MODEL.SWIN.OUT_FEATURES", {("res2", "res3", "res4", "res5"): None})
    backbone_config = {
        "model_type": "swin",
        "image_size": config["MODEL.SWIN.PRETRAIN_IMG_SIZE"],
        "patch_size": config["MODEL.SWIN.PATCH_SIZE"],
        "embed_dim": config["MODEL.SWIN.EMBED_DIM"],
        "depths": list(config["MODEL.SWIN.DEPTHS"]),
        "num_heads": list(config["MODEL.SWIN.NUM_HEADS"]),
        "window_size": config["MODEL.SWIN.WINDOW_SIZE"],
        "mlp_ratio": config["MODEL.SWIN.MLP_RATIO"],
        "qkv_bias": config["MODEL.SWIN.QKV_BIAS"],
        "hidden_dropout_prob": config["MODEL.SWIN.DROP_RATE"],
        "attention_probs_dropout_prob": config["MODEL.SWIN.ATTN_DROP_RATE"],
        "drop_path_rate": config["MODEL.SWIN.DROP_PATH_RATE"],
        "out_features": ALL_STAGES,
    }
    return {"backbone_config": backbone_config}


def _resnet_settings(config: Detectron2Config) -> dict[str, Any]:
    config.choose("MODEL.RESNETS.OUT_FEATURES", {("res2", "res3", "res4", "res5"): None})
    config.choose("MODEL.RESNETS.NUM_GROUPS", {1: None})
    config.choose("MODEL.RESNETS.RES5_DILATION", {1: None})
    config.choose("MODEL.RESNETS.DEFORM_ON_PER_STAGE", {(False, False, False, False): None})
    layer_type, depths = config.choose("MODEL.RESNETS.DEPTH", RESNET_DEPTHS)
    channels = config["MODEL.RESNETS.RES2_OUT_CHANNELS"]
    if layer_type == "bottleneck":
        config.choose("MODEL.RESNETS.WIDTH_PER_GROUP", {channels // 4: None})
    backbone_config = {
        "model_type": "resnet",
        "embedding_size": config["MODEL.RESNETS.STEM_OUT_CHANNELS"],
        "hidden_sizes": [channels, 2 * channels, 4 * channels, 8 * channels],
        "depths": depths,
        "layer_type": layer_type,
        "downsample_in_bottleneck": config["MODEL.RESNETS.STRIDE_IN_1X1"],
        "out_features": ALL_STAGES,
    }
    frozen = config.choose("MODEL.RESNETS.NORM", {"FrozenBN": True, "BN": False, "SyncBN": False})
    return {"backbone_config": backbone_config, "freeze_backbone_batch_norm": frozen}


def reads_bgr(config: Detectron2Config) -> bool:
    """Whether the original model gets images with blue first."""
    return config.choose("INPUT.FORMAT", {"RGB": False, "BGR": True})


def dataset_of(config: Detectron2Config) -> str | None:
    """
    Find the category set of a configuration's data.

    Args:
        config: A Mask2Former or PRO-SCALE configuration.

    Returns:
        Name of the category set (`proscale_hf.data.categories`) of the first training set, from which the originals
        take names and colours; None if the originals do not register that set. The number of classes is not
        compared: a model may have been trained on the images of a known set with other classes.
    """
    dataset = next(iter(config["DATASETS.TRAIN"]), "")
    return next((category_set for pattern, category_set in DATASETS if pattern.fullmatch(dataset)), None)


def image_processor_settings(config: Detectron2Config) -> dict[str, Any]:
    """
    Translate the entries about the input.

    Args:
        config: A Mask2Former or PRO-SCALE configuration.

    Returns:
        Keyword arguments for the image processor. Mean and deviation are for RGB images with values in 0..1.

    Raises:
        ConversionError: an entry has an impossible value.
    """
    mean, std = ([value / 255 for value in config[f"MODEL.PIXEL_{name}"]] for name in ("MEAN", "STD"))
    shortest_edge = config["INPUT.MIN_SIZE_TEST"]
    size_divisor = config["MODEL.MASK_FORMER.SIZE_DIVISIBILITY"]
    return {
        "image_mean": mean[::-1] if reads_bgr(config) else mean,
        "image_std": std[::-1] if reads_bgr(config) else std,
        "do_resize": shortest_edge > 0,  # 0 switches it off
        "size": {"shortest_edge": shortest_edge, "longest_edge": config["INPUT.MAX_SIZE_TEST"]},
        "size_divisor": size_divisor if size_divisor > 0 else 32,
        "ignore_index": config["MODEL.SEM_SEG_HEAD.IGNORE_VALUE"],
        "top_k": config["TEST.DETECTIONS_PER_IMAGE"],
    }
