"""The settings that all families share: a backbone, its maps, and the encoder that works on their tokens.

What PRO-SCALE adds (https://arxiv.org/abs/2404.14657, section 3 and appendix C) is `encoder` to `stage_residual`.
"""

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig


ENCODERS = ("proscale", "mask2former", "lite", "rt")
TOKEN_RECALIBRATIONS = ("none", "linear", "conv")
TOKEN_RECALIBRATION_LAYOUTS = ("paper", "original")
NORM_GROUPS = 32  # of the group norms around the encoder, as in Mask2Former and DINO
LARGEST_NUMBER = 2**20  # of any size or count
MOST_LAYERS = 1000
LAYERS = re.compile(r"(.*_)?(layers|depths?)")  # names of fields that count layers, of backbones too
OF_LABELS = ("id2label", "label2id", "categories", "ignore_value")


@strict
class EncoderConfig(PreTrainedConfig):
    r"""
    The base of the families' configurations.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`):
            Configuration of any transformers backbone that gives one feature map per entry of `feature_strides`
            (Swin, ResNet, ...; timm's through `model_type="timm_backbone"`). A dict must have `model_type`. The
            object is shared with the model, not copied.
        freeze_backbone_batch_norm (`bool`, defaults to `True`):
            Keep the batch norms of the backbone (if it has any) at their stored statistics and weights in training.
        feature_strides (`list[int]`, defaults to `(4, 8, 16, 32)`):
            Strides of the backbone's feature maps, fine to coarse.
        encoder (`str`, defaults to `"proscale"`):
            Transformer encoder of the maps' tokens. `"proscale"`: tokens of larger maps enter in later stages
            (paper, section 3.1). `"mask2former"`, or `"dino"` in detection: all tokens in every layer. The paper's
            baselines: `"lite"`, Lite-DETR's, where only the last layer changes the finest map; `"rt"`, RT-DETR's,
            attention in the coarsest map and convolutions across scales.
        encoder_stage_layers (`list[int]`, defaults to `(3, 3, 3)`):
            (p1, p2, p3): number of layers in each stage of the `"proscale"` encoder, one entry per token scale,
            coarse to fine.
        encoder_layers (`int`, defaults to 6):
            Number of layers of the `"mask2former"`, `"dino"` and `"lite"` encoders. The others do not read it.
        encoder_num_points (`int`, defaults to 4):
            Sampling points per head and level of the encoder's deformable attention. `"rt"` does not read it.
        encoder_feedforward_dim (`int`, defaults to 1024):
            Width of the feed-forward blocks in the encoder.
        token_recalibration (`str`, defaults to `"linear"`):
            Token re-calibration (paper, appendix C): the maps of the earlier stages are weighted by an attention map
            made from the finest one. `"none"`, `"linear"` or `"conv"` (a 1x1 convolution). Only with `"proscale"`.
        token_recalibration_temperature (`float`, defaults to 0.1):
            The factor epsilon in front of the re-calibration's logits.
        token_recalibration_layout (`str`, defaults to `"paper"`):
            `"paper"`: the attention map belongs to positions, as the paper's equation 4 says. `"original"`: as in the
            released code, which reinterprets (tokens, channels) memory as (channels, height, width) and so mixes
            positions and channels; weights trained with that code need it.
        stage_residual (`bool`, defaults to `False`):
            Add a stage's input tokens to the output of each of its layers, in all stages but the last.
        feature_size (`int`, defaults to 256):
            Channels of the encoder's feature maps, a multiple of 32.
        num_attention_heads (`int`, defaults to 8):
            Attention heads in encoder and decoder.
        dropout (`float`, defaults to 0.0):
            Dropout probability in encoder and decoder.

    Raises:
        ValueError: a field has a value that is not possible; the message names the possible ones.
    """

    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 - transformers reads a plain class attribute
    encoders = ENCODERS  # those that the family has

    backbone_config: dict | PreTrainedConfig | None = None
    freeze_backbone_batch_norm: bool = True
    feature_strides: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    encoder: str = "proscale"
    encoder_stage_layers: list[int] | tuple[int, ...] = (3, 3, 3)
    encoder_layers: int = 6
    encoder_num_points: int = 4
    encoder_feedforward_dim: int = 1024
    token_recalibration: str = "linear"
    token_recalibration_temperature: float | int = 0.1
    token_recalibration_layout: str = "paper"
    stage_residual: bool = False
    feature_size: int = 256
    num_attention_heads: int = 8
    dropout: float | int = 0.0

    def __post_init__(self, **kwargs: Any):
        check_extent({**vars(self), **kwargs})
        if isinstance(self.backbone_config, dict):
            self.backbone_config = _backbone_config_from_dict(self.backbone_config)
        super().__post_init__(**kwargs)
        self.check_values()

    @property
    def encoder_strides(self) -> tuple[int, ...]:
        """Strides of the maps that the encoder gets, coarse to fine."""
        return tuple(reversed(self.feature_strides))

    def check_values(self) -> None:
        """Refuse what is not possible. A family checks its own fields and calls this for the shared ones.

        Raises:
            ValueError: one line that names the field.
        """
        check_choice("encoder", self.encoder, self.encoders)
        check_choice("token_recalibration", self.token_recalibration, TOKEN_RECALIBRATIONS)
        check_choice("token_recalibration_layout", self.token_recalibration_layout, TOKEN_RECALIBRATION_LAYOUTS)
        strides = list(self.feature_strides)
        if not strides or strides != sorted(set(strides)):
            raise ValueError(f"`feature_strides` must grow, got {strides}.")
        scales = len(self.encoder_strides)
        if len(self.encoder_stage_layers) != scales or min(self.encoder_stage_layers) < 1:
            raise ValueError(
                f"`encoder_stage_layers` must be {scales} numbers of at least 1, one per token scale, "
                f"got {tuple(self.encoder_stage_layers)}."
            )
        if self.encoder == "lite" and scales < 2:
            raise ValueError("`encoder` 'lite' needs maps of at least two strides: one that it changes less often.")
        for name in ("encoder_layers", "encoder_num_points", "encoder_feedforward_dim"):
            check_minimum(name, getattr(self, name), 1)
        check_weight("token_recalibration_temperature", self.token_recalibration_temperature)
        check_share("dropout", self.dropout)
        check_multiple("feature_size", self.feature_size, NORM_GROUPS, "the groups of the group norm")
        check_multiple("feature_size", self.feature_size, self.num_attention_heads, "`num_attention_heads`")


def check_extent(values: Mapping[str, Any]) -> None:
    """Refuse numbers with which to build the model would take all memory, or for ever: a file may ask for that.

    Args:
        values: the fields of a configuration and, in mappings among them, those of its backbone.

    Raises:
        ValueError: one line that names the field.
    """
    layers = 0
    for name, value in _numbers(values):
        if abs(value) > LARGEST_NUMBER:
            raise ValueError(f"`{name}` must be at most {LARGEST_NUMBER:,} in size.")
        layers += value if LAYERS.fullmatch(name) else 0
    if layers > MOST_LAYERS:
        raise ValueError(f"The configuration asks for {layers:,} layers; at most {MOST_LAYERS:,} are possible.")


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The whole numbers among the fields, those in lists too, each with its field's name."""
    for name, value in values.items():
        if name in OF_LABELS:
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int):
                yield name, number


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises a ValueError unless a field's value is one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_minimum(name: str, value: float, minimum: float) -> None:
    """Raises a ValueError if a field's value is below the minimum."""
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")


def check_weight(name: str, value: float) -> None:
    """Raises a ValueError unless a field's value is finite and not negative."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"`{name}` must be a number of at least 0, got {value}.")


def check_share(name: str, value: float) -> None:
    """Raises a ValueError unless a field's value lies between 0 and 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must lie between 0 and 1, got {value}.")


def check_multiple(name: str, value: int, divisor: int, reason: str) -> None:
    """Raises a ValueError unless a field's value is a positive multiple of the divisor."""
    if divisor < 1 or value % divisor or value < 1:
        raise ValueError(f"`{name}` ({value}) must be a multiple of {divisor}, {reason}.")


def _backbone_config_from_dict(values: dict[str, Any]) -> PreTrainedConfig:
    values = copy.deepcopy(values)
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            "`backbone_config` needs a `model_type` that transformers knows, such as 'swin', 'resnet' or "
            f"'timm_backbone', got {model_type!r}."
        )
    return CONFIG_MAPPING[model_type].from_dict(values)
