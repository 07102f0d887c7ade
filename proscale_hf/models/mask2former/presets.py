"""Configurations by name: `ProScaleMask2FormerConfig.from_preset("proscale-swin-t-coco")`.

A name is ARCHITECTURE-BACKBONE-DATASET, like those of the published models (`model_names.py`), with the task behind if
it is not the panoptic one, and PRO-SCALE's numbers of layers if they are not (3, 3, 3): `lite-r50-coco`,
`mask2former-swin-l-22k-ade20k-semantic`, `proscale-swin-t-cityscapes-113`.

A preset is a new model's configuration: the paper's recalibration, padding kept out. The published models' own, which
`from_pretrained` reads, say in addition where their weights need the original's ways.
"""

import copy
import difflib
from typing import Any


MAPS = ["stage1", "stage2", "stage3", "stage4"]  # at strides 4, 8, 16 and 32
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

NUM_LABELS = {
    "coco": 133,
    "coco-panoptic": 133,
    "coco-instance": 80,
    "cityscapes": 19,
    "cityscapes-panoptic": 19,
    "cityscapes-instance": 8,
    "cityscapes-semantic": 19,
    "ade20k": 150,
    "ade20k-panoptic": 150,
    "ade20k-instance": 100,
    "ade20k-semantic": 150,
    "mapillary-vistas": 65,
    "mapillary-vistas-panoptic": 65,
    "mapillary-vistas-semantic": 65,
}

WITHOUT_RECALIBRATION = {"token_recalibration": "none"}
RT_STRIDES = [8, 16, 32]
ENCODERS = {  # by what a name has in front and behind
    ("proscale", ""): {},
    **{
        ("proscale", f"-{p1}{p2}{p3}"): {"encoder_stage_layers": [p1, p2, p3]}
        for p1, p2, p3 in ((1, 1, 1), (2, 2, 2), (3, 1, 1), (1, 3, 1), (1, 1, 3))
    },
    ("mask2former", ""): {"encoder": "mask2former", "pixel_embedding": "conv", **WITHOUT_RECALIBRATION},
    ("lite", ""): {"encoder": "lite", "pixel_embedding": "conv", **WITHOUT_RECALIBRATION},
    ("lite-lpe", ""): {"encoder": "lite", "pixel_embedding": "maxpool", **WITHOUT_RECALIBRATION},
    ("rt", ""): {
        "encoder": "rt",
        "pixel_embedding": "none",
        "common_stride": RT_STRIDES[0],
        "feature_strides": RT_STRIDES,
        **WITHOUT_RECALIBRATION,
    },
}


def _settings(architecture: str, encoder: dict[str, Any], backbone: str, data: str) -> dict[str, Any]:
    settings = {"backbone_config": BACKBONES[backbone], "num_labels": NUM_LABELS[data], **encoder}
    if architecture == "rt":
        settings["backbone_config"] = {
            key: value[-len(RT_STRIDES) :] if key in ("out_features", "out_indices") else value
            for key, value in BACKBONES[backbone].items()
        }
    # what Mask2Former's configurations change for some data sets
    if backbone == "swin-l-22k" and not data.endswith("-semantic"):
        settings["num_queries"] = 200
    if (data.startswith("cityscapes") and backbone in ("r50", "r101")) or (data, backbone) == (
        "ade20k-semantic",
        "r101",
    ):
        settings["freeze_backbone_batch_norm"] = False
    return settings


PRESETS = {
    f"{architecture}-{backbone}-{data}{stages}": _settings(architecture, encoder, backbone, data)
    for (architecture, stages), encoder in ENCODERS.items()
    for backbone in BACKBONES
    for data in NUM_LABELS
}


def preset_settings(name: str) -> dict[str, Any]:
    """
    Args:
        name: of a preset.

    Returns:
        Keyword arguments for `ProScaleMask2FormerConfig`, the caller's own.

    Raises:
        ValueError: there is no such preset; the message has the nearest names.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(str(name).lower(), PRESETS, n=3, cutoff=0)
        raise ValueError(f"There is no preset {name!r}. The nearest names are {', '.join(nearest)}.")
    return copy.deepcopy(PRESETS[name])
