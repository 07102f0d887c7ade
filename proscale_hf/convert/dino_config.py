"""Translates the settings of the original DINO into settings of this package's model.

A checkpoint of the original has them in `args`. What the weights themselves say is taken from the weights: the sizes of
the backbone, and the number of classes. Values for which this package has no model are refused.
"""

import ast
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from proscale_hf.convert import ConversionError
from proscale_hf.files.reading import read_bytes, reading
from proscale_hf.files.text import shown


LARGEST_FILE = 2**20  # bytes, of a file of settings
STRIDES = (4, 8, 16, 32)

# This package's fields, and what the original calls them, with the values of its configuration of four scales.
FIELDS: dict[str, tuple[str, Any]] = {
    "feature_size": ("hidden_dim", 256),
    "num_attention_heads": ("nheads", 8),
    "encoder_layers": ("enc_layers", 6),
    "decoder_layers": ("dec_layers", 6),
    "num_queries": ("num_queries", 900),
    "num_feature_levels": ("num_feature_levels", 4),
    "encoder_feedforward_dim": ("dim_feedforward", 2048),
    "decoder_feedforward_dim": ("dim_feedforward", 2048),
    "encoder_num_points": ("enc_n_points", 4),
    "decoder_num_points": ("dec_n_points", 4),
    "position_temperature": ("pe_temperatureH", 20),
    "dropout": ("dropout", 0.0),
    "num_denoising": ("dn_number", 100),
    "label_noise_ratio": ("dn_label_noise_ratio", 0.5),
    "box_noise_scale": ("dn_box_noise_scale", 1.0),
    "auxiliary_loss": ("aux_loss", True),
    "class_cost": ("set_cost_class", 2.0),
    "bbox_cost": ("set_cost_bbox", 5.0),
    "giou_cost": ("set_cost_giou", 2.0),
    "class_loss_coefficient": ("cls_loss_coef", 1.0),
    "bbox_loss_coefficient": ("bbox_loss_coef", 5.0),
    "giou_loss_coefficient": ("giou_loss_coef", 2.0),
    "two_stage_loss_coefficient": ("interm_loss_coef", 1.0),
    "focal_alpha": ("focal_alpha", 0.25),
}

# What a model here always is. A file without one of these entries has its value.
REQUIRED: dict[str, Any] = {
    "modelname": "dino",
    "masks": False,
    "dilation": False,
    "position_embedding": "sine",
    "pre_norm": False,
    "unic_layers": 0,
    "query_dim": 4,
    "num_patterns": 0,
    "transformer_activation": "relu",
    "use_deformable_box_attn": False,
    "dec_layer_number": None,
    "decoder_layer_noise": False,
    "add_channel_attention": False,
    "add_pos_value": False,
    "two_stage_type": "standard",
    "two_stage_pat_embed": 0,
    "two_stage_add_query_num": 0,
    "two_stage_bbox_embed_share": False,
    "two_stage_class_embed_share": False,
    "two_stage_learn_wh": False,
    "two_stage_keep_all_tokens": False,
    "dec_pred_bbox_embed_share": True,
    "dec_pred_class_embed_share": True,
    "decoder_sa_type": "sa",
    "decoder_module_seq": ["sa", "ca", "ffn"],
    "embed_init_tgt": True,
    "no_interm_box_loss": False,
    "matcher_type": "HungarianMatcher",
    "use_detached_boxes_dec_out": False,
}


def read_settings(path: Path, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """
    Read settings that a checkpoint lacks.

    Args:
        path: A configuration of the original, `.py` with lines `name = value` and a `_base_`, or the `.json` that its
            training writes. Nothing in it is run.
        above: Names of the files whose `_base_` it is.

    Raises:
        ConversionError: it cannot be read, or says something that is no plain value.
    """
    with reading(path, "is no configuration of DINO", ConversionError):
        text = read_bytes(path, LARGEST_FILE, "configuration").decode()
        settings = json.loads(text) if path.suffix == ".json" else _assignments(text)
        if not isinstance(settings, dict):
            raise ConversionError(f"{path} is no configuration of DINO: it must hold names and values.")
    bases = settings.pop("_base_", [])
    below: dict[str, Any] = {}
    for name in [bases] if isinstance(bases, str) else bases:
        if Path(name).name != name or path.name in above:
            raise ConversionError(f"{path} has a `_base_` in another folder, or on itself: {shown(name)}.")
        below |= read_settings(path.with_name(name), (*above, path.name))
    return below | settings


def _assignments(text: str) -> dict[str, Any]:
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
    }


def model_settings(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """
    Args:
        settings: The original's.
        tensors: The original's weights, by its names.

    Returns:
        Keyword arguments for `ProScaleDinoConfig`.

    Raises:
        ConversionError: there is no such model here; the message names the entry.
    """
    if "enc_scale" in settings or any(".self_attn.query_proj." in name for name in tensors):
        raise ConversionError(
            "This is a Lite-DETR checkpoint. Its encoder has key-aware attention, which is no part of PRO-SCALE's "
            "'lite' encoder, so its weights cannot be converted."
        )
    for name, value in REQUIRED.items():
        found = settings.get(name, value)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise ConversionError(f"{name} is {shown(found)}, but only {value!r} can be converted.")
    model = {field: _entry(settings, *entry) for field, entry in FIELDS.items()}
    if settings.get("pe_temperatureW", model["position_temperature"]) != model["position_temperature"]:
        raise ConversionError("pe_temperatureH and pe_temperatureW differ; only one temperature can be converted.")
    if not settings.get("use_dn", True):
        model["num_denoising"] = 0
    stages = list(_entry(settings, "return_interm_indices", [1, 2, 3]))
    if not all(type(stage) is int and 0 <= stage < len(STRIDES) for stage in stages) or stages != sorted(set(stages)):
        raise ConversionError(f"return_interm_indices is {shown(stages)}, but must be some of 0, 1, 2 and 3, in order.")
    return {
        **model,
        "backbone_config": _backbone(settings, tensors, [f"stage{stage + 1}" for stage in stages]),
        "feature_strides": [STRIDES[stage] for stage in stages],
        "encoder": "dino",
        "encoder_stage_layers": [3] * model["num_feature_levels"],
        "token_recalibration": "none",
        "batch_padding": "original",
        "num_labels": len(_tensor(tensors, "class_embed.0.weight")),
    }


def _entry(settings: Mapping[str, Any], name: str, default: Any) -> Any:
    """A value of the default's type; a whole number is a number."""
    value = settings.get(name, default)
    kinds = (int, float) if type(default) in (int, float) else type(default)
    if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise ConversionError(f"{name} is {shown(value)}, but must be of type {type(default).__name__}.")
    return value


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ConversionError(f"The checkpoint has no {name}, so it is none of DINO with a ResNet or a Swin backbone.")
    return tensors[name]


def _backbone(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], out_features: list[str]) -> dict[str, Any]:
    """The backbone's configuration, as its weights have it."""
    if "backbone.0.body.conv1.weight" in tensors:
        return {**_resnet(tensors), "out_features": out_features}
    if "backbone.0.patch_embed.proj.weight" in tensors:
        return {**_swin(tensors), "out_features": out_features}
    raise ConversionError(f"The backbone {shown(settings.get('backbone'))} is neither a ResNet nor a Swin Transformer.")


def _resnet(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    depths = [_count(tensors, rf"backbone\.0\.body\.layer{stage}\.(\d+)\..*") for stage in (1, 2, 3, 4)]
    is_bottleneck = "backbone.0.body.layer1.0.conv3.weight" in tensors
    last = "conv3" if is_bottleneck else "conv2"
    return {
        "model_type": "resnet",
        "embedding_size": len(tensors["backbone.0.body.conv1.weight"]),
        "hidden_sizes": [
            len(_tensor(tensors, f"backbone.0.body.layer{stage}.0.{last}.weight")) for stage in (1, 2, 3, 4)
        ],
        "depths": depths,
        "layer_type": "bottleneck" if is_bottleneck else "basic",
    }


def _swin(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    patches = tensors["backbone.0.patch_embed.proj.weight"]
    stages = range(_count(tensors, r"backbone\.0\.layers\.(\d+)\..*"))
    blocks = [f"backbone.0.layers.{stage}.blocks.0" for stage in stages]
    tables = [_tensor(tensors, f"{block}.attn.relative_position_bias_table") for block in blocks]
    return {
        "model_type": "swin",
        "patch_size": patches.shape[-1],
        "embed_dim": len(patches),
        "depths": [_count(tensors, rf"backbone\.0\.layers\.{stage}\.blocks\.(\d+)\..*") for stage in stages],
        "num_heads": [table.shape[-1] for table in tables],
        "window_size": (math.isqrt(len(tables[0])) + 1) // 2,
        "mlp_ratio": len(_tensor(tensors, f"{blocks[0]}.mlp.fc1.weight")) / len(patches),
        "qkv_bias": f"{blocks[0]}.attn.qkv.bias" in tensors,
        "drop_path_rate": 0.2,
    }


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    numbers = {int(match[1]) for name in tensors if (match := re.fullmatch(pattern, name))}
    return len(numbers)
