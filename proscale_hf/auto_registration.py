"""Makes `AutoConfig`, `AutoModel...`, `AutoImageProcessor` and pipelines find the classes of this package.

`import proscale_hf` should stay light, but transformers' model and image-processor base classes import torchvision. So
models are registered by stand-ins that load the class on first use. Image processors must be registered as real
classes; that happens when transformers' own `AutoImageProcessor` is imported, which brings torchvision in any case.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForUniversalSegmentation,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from .configuration_proscale_mask2former import ProScaleMask2FormerConfig


AUTO_IMAGE_PROCESSOR_MODULE = "transformers.models.auto.image_processing_auto"


def register_with_auto_classes() -> None:
    """Register configuration, models and image processors with transformers."""
    AutoConfig.register(ProScaleMask2FormerConfig.model_type, ProScaleMask2FormerConfig, exist_ok=True)
    base = LazyModelClass("ProScaleMask2FormerModel")
    segmenter = LazyModelClass("ProScaleMask2FormerForUniversalSegmentation")
    AutoModel.register(ProScaleMask2FormerConfig, base, exist_ok=True)
    segmentation_classes = (
        AutoModelForUniversalSegmentation,
        AutoModelForInstanceSegmentation,
        AutoModelForImageSegmentation,  # what `pipeline("image-segmentation")` loads with
    )
    for auto_class in segmentation_classes:
        auto_class.register(ProScaleMask2FormerConfig, segmenter, exist_ok=True)
    # pipelines look names up here, and warn about those that are missing
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES[ProScaleMask2FormerConfig.model_type] = segmenter.__name__

    if AUTO_IMAGE_PROCESSOR_MODULE in sys.modules:
        register_image_processors(sys.modules[AUTO_IMAGE_PROCESSOR_MODULE])
    else:
        sys.meta_path.insert(0, RegisterAfterImport())


def register_image_processors(auto_module: ModuleType) -> None:
    """Register the image processors whose backend is installed."""
    package = sys.modules[__package__]
    processors = {"pil": package.ProScaleMask2FormerImageProcessorPil}
    if is_torchvision_available():
        processors["torchvision"] = package.ProScaleMask2FormerImageProcessor
    auto_module.AutoImageProcessor.register(
        ProScaleMask2FormerConfig, image_processor_classes=processors, exist_ok=True
    )


def image_processor_class() -> type:
    """The image processor of the installed backend: torchvision's, or else Pillow's."""
    package = sys.modules[__package__]
    if is_torchvision_available():
        return package.ProScaleMask2FormerImageProcessor
    return package.ProScaleMask2FormerImageProcessorPil


class LazyModelClass:
    """Stands for a model class of this package and loads it when anything but its name is needed.

    Args:
        name: a public name of the package.
    """

    config_class = ProScaleMask2FormerConfig

    def __init__(self, name: str):
        self.__name__ = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._load(), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._load()(*args, **kwargs)

    def _load(self) -> type:
        return getattr(sys.modules[__package__], self.__name__)


class RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Registers the image processors right after transformers' `AutoImageProcessor` was imported."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != AUTO_IMAGE_PROCESSOR_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register_image_processors(module)

        spec.loader.exec_module = execute_and_register
        return spec
