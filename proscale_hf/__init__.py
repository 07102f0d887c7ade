"""PRO-SCALE on the Mask2Former architecture for Hugging Face Transformers.

Importing the package registers its classes with transformers' Auto classes. Everything else is imported when it is
first used, transformers too: that takes seconds, which not every command needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from proscale_hf.hub.auto_classes import register_with_auto_classes
from proscale_hf.version import __version__


if TYPE_CHECKING:
    from proscale_hf.models.dino.configuration_proscale_dino import ProScaleDinoConfig
    from proscale_hf.models.dino.image_processing_proscale_dino import (
        ProScaleDinoImageProcessor,
        ProScaleDinoImageProcessorPil,
    )
    from proscale_hf.models.dino.modeling_proscale_dino import (
        ProScaleDinoForObjectDetection,
        ProScaleDinoModel,
        ProScaleDinoPreTrainedModel,
    )
    from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig
    from proscale_hf.models.mask2former.image_processing_proscale_mask2former import (
        ProScaleMask2FormerImageProcessor,
        ProScaleMask2FormerImageProcessorPil,
    )
    from proscale_hf.models.mask2former.modeling_proscale_mask2former import (
        ProScaleMask2FormerForUniversalSegmentation,
        ProScaleMask2FormerModel,
        ProScaleMask2FormerPreTrainedModel,
    )

LAZY_NAMES = {
    "ProScaleDinoConfig": "models.dino.configuration_proscale_dino",
    "ProScaleDinoForObjectDetection": "models.dino.modeling_proscale_dino",
    "ProScaleDinoImageProcessor": "models.dino.image_processing_proscale_dino",
    "ProScaleDinoImageProcessorPil": "models.dino.image_processing_proscale_dino",
    "ProScaleDinoModel": "models.dino.modeling_proscale_dino",
    "ProScaleDinoPreTrainedModel": "models.dino.modeling_proscale_dino",
    "ProScaleMask2FormerConfig": "models.mask2former.configuration_proscale_mask2former",
    "ProScaleMask2FormerForUniversalSegmentation": "models.mask2former.modeling_proscale_mask2former",
    "ProScaleMask2FormerModel": "models.mask2former.modeling_proscale_mask2former",
    "ProScaleMask2FormerPreTrainedModel": "models.mask2former.modeling_proscale_mask2former",
    "ProScaleMask2FormerImageProcessor": "models.mask2former.image_processing_proscale_mask2former",
    "ProScaleMask2FormerImageProcessorPil": "models.mask2former.image_processing_proscale_mask2former",
}

__all__ = [
    "ProScaleDinoConfig",
    "ProScaleDinoForObjectDetection",
    "ProScaleDinoImageProcessor",
    "ProScaleDinoImageProcessorPil",
    "ProScaleDinoModel",
    "ProScaleDinoPreTrainedModel",
    "ProScaleMask2FormerConfig",
    "ProScaleMask2FormerForUniversalSegmentation",
    "ProScaleMask2FormerImageProcessor",
    "ProScaleMask2FormerImageProcessorPil",
    "ProScaleMask2FormerModel",
    "ProScaleMask2FormerPreTrainedModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in LAZY_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{LAZY_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_auto_classes()
