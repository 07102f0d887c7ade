"""Backbones of transformers and timm: loaded, checked against what a model expects, frozen in part, and made faster.

All that is changed in modules of others is changed here, once they are built. Their layers become a subclass of what
they were, so weights, their names and results stay as they are.
"""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig
from transformers.backbone_utils import load_backbone as load_transformers_backbone

from proscale_hf.backbones.mvit_windows import use_hybrid_windows
from proscale_hf.backbones.swin_mlp import use_lean_mlp
from proscale_hf.backbones.swin_strips import use_strips
from proscale_hf.layers.linear import use_onednn


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
    for make_faster in (use_hybrid_windows, use_strips, use_lean_mlp, use_onednn):
        make_faster(backbone)
    return backbone


def freeze(backbone: nn.Module, batch_norms: bool) -> None:
    """Keep parameters out of training. Loading weights replaces parameters, so this is called again after it.

    Swin's last norm is for its classifier. Nothing uses it here, and processes that train together would wait for its
    gradient.

    Args:
        backbone: any.
        batch_norms: whether batch norms keep their statistics and weights.
    """
    for name, parameter in backbone.named_parameters():
        if name.startswith("swin.layernorm."):
            parameter.requires_grad_(False)
    if batch_norms:
        for module in backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval().requires_grad_(False)
