"""Configurations by name: `ProScaleDinoConfig.from_preset("proscale-dino-r50-coco")`.

A name is ARCHITECTURE-BACKBONE-DATASET, with PRO-SCALE's numbers of layers behind if they are not (3, 3, 3, 3):
`dino-swin-l-22k-coco`, `lite-dino-r50-coco`, `proscale-dino-r50-coco-3331`. A `-5scale` behind DINO's name adds the map
of stride 4, as in the original: `dino-5scale-r50-coco`.

A preset is a new model's configuration: the paper's recalibration, padding kept out.
"""

import copy
from typing import Any

from proscale_hf.backbones.presets import BACKBONES, backbone_settings
from proscale_hf.models.preset_names import PresetNames


NUM_LABELS = {"coco": 80}
WITHOUT_RECALIBRATION = {"token_recalibration": "none"}
ARCHITECTURES = {
    "proscale-dino": {},
    "dino": {"encoder": "dino", **WITHOUT_RECALIBRATION},
    "dino-5scale": {
        "encoder": "dino",
        "feature_strides": [4, 8, 16, 32],
        "num_feature_levels": 5,
        "encoder_stage_layers": [3, 3, 3, 3, 3],
        **WITHOUT_RECALIBRATION,
    },
    "lite-dino": {"encoder": "lite", **WITHOUT_RECALIBRATION},
}
STAGES = ("1111", "2222", "3331")  # of "proscale-dino" alone
NAMES = PresetNames(ARCHITECTURES, BACKBONES, NUM_LABELS, STAGES, staged="proscale-dino")
MAPS = 3  # of the backbone, where the architecture does not say


def preset_settings(name: str) -> dict[str, Any]:
    """
    Args:
        name: of a preset.

    Returns:
        Keyword arguments for `ProScaleDinoConfig`, the caller's own.

    Raises:
        ValueError: there is no such preset; the message has the nearest names.
    """
    architecture, backbone, data, stages = NAMES.parts(name)
    settings = {"num_labels": NUM_LABELS[data], **copy.deepcopy(ARCHITECTURES[architecture])}
    settings["backbone_config"] = backbone_settings(backbone, maps=len(settings.get("feature_strides", range(MAPS))))
    if stages is not None:
        settings["encoder_stage_layers"] = [int(layers) for layers in stages]
    return settings


def is_preset(name: str) -> bool:
    """Whether there is a preset of this name."""
    return name in NAMES
