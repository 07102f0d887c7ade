"""Configurations by name: `ProScaleMask2FormerConfig.from_preset("proscale-swin-t-coco")`.

A name is ARCHITECTURE-BACKBONE-DATASET, like those of the published models (`hub/names.py`), with the task behind if
it is not the panoptic one, and PRO-SCALE's numbers of layers if they are not (3, 3, 3): `lite-r50-coco`,
`mask2former-swin-l-22k-ade20k-semantic`, `proscale-swin-t-cityscapes-113`.

A preset is a new model's configuration: the paper's recalibration, padding kept out. The published models' own, which
`from_pretrained` reads, say in addition where their weights need the original's ways.
"""

import copy
import difflib
import re
from itertools import product
from typing import Any

from proscale_hf.backbones.presets import BACKBONES, backbone_settings


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


def preset_settings(name: str) -> dict[str, Any]:
    """
    Args:
        name: of a preset.

    Returns:
        Keyword arguments for `ProScaleMask2FormerConfig`, the caller's own.

    Raises:
        ValueError: there is no such preset; the message has the nearest names.
    """
    parts = _parts(name)
    if parts is None:
        nearest = difflib.get_close_matches(str(name).lower(), preset_names(), n=3, cutoff=0)
        raise ValueError(f"There is no preset {name!r}. The nearest names are {', '.join(nearest)}.")
    architecture, backbone, data, stages = parts
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
    return _parts(name) is not None


def preset_names() -> list[str]:
    """All names, over a thousand."""
    return [
        f"{architecture}-{backbone}-{data}{stages}"
        for architecture, backbone, data in product(ARCHITECTURES, BACKBONES, NUM_LABELS)
        for stages in ("", *(f"-{stages}" for stages in STAGES if architecture == "proscale"))
    ]


def _parts(name: str) -> tuple[str, str, str, str | None] | None:
    """Architecture, backbone, data with task, and numbers of layers; None if this is no preset's name."""
    choices = ("|".join(map(re.escape, names)) for names in (ARCHITECTURES, BACKBONES, NUM_LABELS, STAGES))
    match = re.fullmatch("({})-({})-({})(?:-({}))?".format(*choices), str(name))
    if match is None or (match[4] is not None and match[1] != "proscale"):
        return None
    return match.groups()
