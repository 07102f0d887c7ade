"""Configurations by name: `ProScaleMask2FormerConfig.from_preset("proscale-swin-t-coco")`.

A name is ARCHITECTURE-BACKBONE-DATASET, like those of the published models (`hub/names.py`), with the task behind if
it is not the panoptic one, and PRO-SCALE's numbers of layers if they are not (3, 3, 3): `lite-r50-coco`,
`mask2former-swin-l-22k-ade20k-semantic`, `proscale-swin-t-cityscapes-113`.

A preset is a new model's configuration: the paper's recalibration, padding kept out. The published models' own, which
`from_pretrained` reads, say in addition where their weights need the original's ways.
"""

import copy
from typing import Any

from proscale_hf.backbones.presets import BACKBONES, backbone_settings
from proscale_hf.models.preset_names import PresetNames


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
ARCHITECTURES = {
    "proscale": {},
    "mask2former": {"encoder": "mask2former", "pixel_embedding": "conv", **WITHOUT_RECALIBRATION},
    "lite": {"encoder": "lite", "pixel_embedding": "conv", **WITHOUT_RECALIBRATION},
    "lite-lpe": {"encoder": "lite", "pixel_embedding": "maxpool", **WITHOUT_RECALIBRATION},
    "rt": {
        "encoder": "rt",
        "pixel_embedding": "none",
        "common_stride": RT_STRIDES[0],
        "feature_strides": RT_STRIDES,
        **WITHOUT_RECALIBRATION,
    },
}
STAGES = ("111", "222", "311", "131", "113")  # of "proscale" alone
NAMES = PresetNames(ARCHITECTURES, BACKBONES, NUM_LABELS, STAGES, staged="proscale")


def preset_settings(name: str) -> dict[str, Any]:
    """
    Args:
        name: of a preset.

    Returns:
        Keyword arguments for `ProScaleMask2FormerConfig`, the caller's own.

    Raises:
        ValueError: there is no such preset; the message has the nearest names.
    """
    architecture, backbone, data, stages = NAMES.parts(name)
    settings = {"num_labels": NUM_LABELS[data], **copy.deepcopy(ARCHITECTURES[architecture])}
    settings["backbone_config"] = backbone_settings(backbone, maps=len(RT_STRIDES) if architecture == "rt" else 4)
    if stages is not None:
        settings["encoder_stage_layers"] = [int(layers) for layers in stages]
    # what Mask2Former's configurations change for some data sets
    if backbone == "swin-l-22k" and not data.endswith("-semantic"):
        settings["num_queries"] = 200
    is_cityscapes_resnet = data.startswith("cityscapes") and backbone in ("r50", "r101")
    if is_cityscapes_resnet or (data, backbone) == ("ade20k-semantic", "r101"):
        settings["freeze_backbone_batch_norm"] = False
    return settings


def is_preset(name: str) -> bool:
    """Whether there is a preset of this name."""
    return name in NAMES


def preset_names() -> list[str]:
    """All names, over a thousand."""
    return list(NAMES)
