"""Backbones by name, as the configurations of Mask2Former and its relatives have them.

Of each backbone these are the settings of its transformers configuration, with the maps at strides 4, 8, 16 and 32.
"""

import copy
from typing import Any


MAPS = ["stage1", "stage2", "stage3", "stage4"]
RESNET50 = {"model_type": "resnet", "depths": [3, 4, 6, 3], "out_features": MAPS}
SWIN_TINY = {
    "model_type": "swin",
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "drop_path_rate": 0.3,
    "out_features": MAPS,
}
SWIN_SMALL = {**SWIN_TINY, "depths": [2, 2, 18, 2]}
SWIN_BASE = {**SWIN_SMALL, "image_size": 384, "window_size": 12, "embed_dim": 128, "num_heads": [4, 8, 16, 32]}
BACKBONES = {
    "r50": RESNET50,
    "r101": {**RESNET50, "depths": [3, 4, 23, 3]},
    "swin-t": SWIN_TINY,
    "swin-s": SWIN_SMALL,
    "swin-b": SWIN_BASE,
    "swin-b-22k": SWIN_BASE,  # pretrained on more images
    "swin-l-22k": {**SWIN_BASE, "embed_dim": 192, "num_heads": [6, 12, 24, 48]},
    "mvitv2-t": {"model_type": "timm_backbone", "backbone": "mvitv2_tiny", "out_indices": [0, 1, 2, 3]},
}


def backbone_settings(name: str, maps: int = len(MAPS)) -> dict[str, Any]:
    """
    Args:
        name: one of `BACKBONES`.
        maps: how many maps the backbone gives, the coarsest ones.

    Returns:
        Its settings, the caller's own.
    """
    settings = copy.deepcopy(BACKBONES[name])
    for key in {"out_features", "out_indices"} & settings.keys():
        settings[key] = settings[key][-maps:]
    return settings
