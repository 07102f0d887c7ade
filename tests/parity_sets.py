"""The recorded sets by family: one of segmentation in the fixtures, more where `PROSCALE_PARITY_DIR` says."""

import os
from pathlib import Path

from safetensors import safe_open

from paths import FIXTURES


FIXTURE = FIXTURES / "parity_r50"


SEGMENTATION = {"multi_scale_features.0", "aux.0.masks_queries_logits"}  # tensors that only these sets have
DETECTION = {"two_stage.topk_tokens", "decoder.input_queries", "pred_boxes"}


def recorded_sets() -> list[Path]:
    """The folders of Mask2Former's kind, the fixture first."""
    return [FIXTURE, *folders_with(SEGMENTATION)]


def recorded_detection_sets() -> list[Path]:
    """The folders of DINO's kind."""
    return folders_with(DETECTION)


def folders_with(names: set[str]) -> list[Path]:
    """The folders whose recorded tensors have these among them: each family records others."""
    more = Path(os.environ.get("PROSCALE_PARITY_DIR", FIXTURE / "none"))
    found = []
    for checkpoint in sorted(more.glob("*/model_final.pth")):
        with safe_open(checkpoint.with_name("expected.safetensors"), "pt") as tensors:
            if names <= set(tensors.keys()):
                found.append(checkpoint.parent)
    return found
