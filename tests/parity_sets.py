"""The recorded sets of segmentation models: one in the fixtures, more where `PROSCALE_PARITY_DIR` says."""

import os
from pathlib import Path

from safetensors import safe_open

from paths import FIXTURES


FIXTURE = FIXTURES / "parity_r50"


def is_of_segmentation(folder: Path) -> bool:
    """Whether a set is of Mask2Former's kind: other families record other tensors."""
    with safe_open(folder / "expected.safetensors", "pt") as tensors:
        return {"multi_scale_features.0", "aux.0.masks_queries_logits"} <= set(tensors.keys())


def recorded_sets() -> list[Path]:
    """The folders, the fixture first."""
    more = Path(os.environ.get("PROSCALE_PARITY_DIR", FIXTURE / "none"))
    folders = sorted(path.parent for path in more.glob("*/model_final.pth"))
    return [FIXTURE, *filter(is_of_segmentation, folders)]
