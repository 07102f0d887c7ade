"""Backbones of transformers and timm: loaded, checked against what a model expects, frozen in part, and made faster.

All that is changed in modules of others is changed here, once they are built. Their layers become a subclass of what
they were, so weights, their names and results stay as they are.
"""

import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.backbone_utils import load_backbone as load_transformers_backbone
from transformers.models.swin.modeling_swin import SwinLayer, SwinMLP, SwinPatchMerging

from proscale_hf.backbones.mvit_windows import use_hybrid_windows
from proscale_hf.backbones.swin_mlp import LeanSwinMLP
from proscale_hf.backbones.swin_strips import SwinLayerInStrips, SwinPatchMergingInStrips
from proscale_hf.layers.linear import Linear
from proscale_hf.layers.untouched import mark_as_built


FASTER = {  # subclasses with the same weights and results
    SwinLayer: SwinLayerInStrips,
    SwinPatchMerging: SwinPatchMergingInStrips,
    SwinMLP: LeanSwinMLP,
    nn.Linear: Linear,
}

RESNET_STEM = re.compile(
    r"(embedder\.embedder|encoder\.stages\.0\.layers\.\d+\.(layer|shortcut)|_backbone\.(conv1|bn1|layer1))\."
)


def load_backbone(config: PreTrainedConfig, feature_strides: Sequence[int]) -> nn.Module:
    """
    Build the backbone of a configuration.

    Args:
        config: has `backbone_config`.
        feature_strides: of the maps that the model reads, fine to coarse.

    Returns:
        A module that makes `feature_maps` of pixels, and has their `channels`.

    Raises:
        ValueError: the backbone gives another number of maps.
    """
    backbone = load_transformers_backbone(config)
    if len(backbone.channels) != len(feature_strides):
        raise ValueError(
            f"The backbone gives {len(backbone.channels)} feature maps, but `feature_strides` names "
            f"{len(feature_strides)}: set `out_features` or `out_indices` in `backbone_config`."
        )
    use_hybrid_windows(backbone)
    make_faster(backbone)
    return backbone


def check_strides(feature_maps: Sequence[torch.Tensor], size: tuple[int, int], feature_strides: Sequence[int]) -> None:
    """Refuse maps that do not have the strides that the configuration declares; not in graphs, which have any size.

    Args:
        feature_maps: (batch, channels, height, width) each, of the backbone.
        size: height and width of the pixels that they were made of.
        feature_strides: what the configuration says, in the same order.

    Raises:
        ValueError: the sides of a map are not those of the image divided by its stride, rounded down or up.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    for feature_map, stride in zip(feature_maps, feature_strides, strict=True):
        shape = tuple(feature_map.shape[-2:])
        if not all(side // stride <= length <= -(-side // stride) for side, length in zip(size, shape, strict=True)):
            found = [round(size[0] / other.shape[-2]) for other in feature_maps]
            raise ValueError(
                f"The backbone's maps have strides of about {found}, but `feature_strides` says "
                f"{list(feature_strides)}: set `feature_strides`, or `out_features` in `backbone_config`."
            )


def make_faster(backbone: nn.Module) -> None:
    """Make each module of a class in `FASTER` one of the faster class, in place, with its weights and hooks."""
    for module in backbone.modules():
        if type(module) in FASTER:
            module.__class__ = FASTER[type(module)]
    mark_as_built(backbone)


def freeze(backbone: nn.Module, batch_norms: bool, stem: bool = False) -> None:
    """Keep parameters out of training. Loading weights replaces parameters, so this is called again after it.

    Swin's last norm is for its classifier. Nothing uses it here, and processes that train together would wait for its
    gradient.

    Args:
        backbone: any.
        batch_norms: whether batch norms keep their statistics and weights.
        stem: whether the stem and the first stage of a ResNet keep their weights, as in DETR.
    """
    for name, parameter in backbone.named_parameters():
        if name.startswith("swin.layernorm.") or (stem and RESNET_STEM.match(name)):
            parameter.requires_grad_(False)
    if batch_norms:
        for module in backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval().requires_grad_(False)
