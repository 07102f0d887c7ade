"""PRO-SCALE on the Mask2Former architecture for Hugging Face Transformers.

Importing the package registers its classes with transformers' Auto classes. Everything else is imported when it is
first used, transformers too: that takes seconds, which not every command needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .auto_registration import register_with_auto_classes


if TYPE_CHECKING:
    from .configuration_proscale_mask2former import ProScaleMask2FormerConfig
    from .image_processing_pil_proscale_mask2former import ProScaleMask2FormerImageProcessorPil
    from .image_processing_proscale_mask2former import ProScaleMask2FormerImageProcessor
    from .modeling_proscale_mask2former import (
        ProScaleMask2FormerForUniversalSegmentation,
        ProScaleMask2FormerModel,
        ProScaleMask2FormerPreTrainedModel,
    )

__version__ = "0.1.0"

LAZY_NAMES = {
    "ProScaleMask2FormerConfig": "configuration_proscale_mask2former",
    "ProScaleMask2FormerForUniversalSegmentation": "modeling_proscale_mask2former",
    "ProScaleMask2FormerModel": "modeling_proscale_mask2former",
    "ProScaleMask2FormerPreTrainedModel": "modeling_proscale_mask2former",
    "ProScaleMask2FormerImageProcessor": "image_processing_proscale_mask2former",
    "ProScaleMask2FormerImageProcessorPil": "image_processing_pil_proscale_mask2former",
}

__all__ = [
    "ProScaleMask2FormerConfig",
    "ProScaleMask2FormerForUniversalSegmentation",
    "ProScaleMask2FormerImageProcessor",
    "ProScaleMask2FormerImageProcessorPil",
    "ProScaleMask2FormerModel",
    "ProScaleMask2FormerPreTrainedModel",
]


def __getattr__(name: str) -> Any:
    if name not in LAZY_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{LAZY_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_auto_classes()
