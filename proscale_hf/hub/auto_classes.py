"""Makes `AutoConfig`, `AutoModel...`, `AutoImageProcessor` and pipelines find the classes of this package.

`import proscale_hf` should stay light, so nothing is registered before transformers' own module for it is imported, and
then right after. Models are registered by stand-ins that load the class on first use, since transformers' base classes
import torchvision. Image processors must be registered as real classes; transformers' module for them imports
torchvision anyway.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_with_auto_classes() -> None:
    """Register configuration, models and image processors with transformers, each as soon as that is possible."""
    configuration = "proscale_hf.models.mask2former.configuration_proscale_mask2former"
    registrations = {
        configuration: register_configuration,  # whichever of the two comes first brings the other along
        "transformers.models.auto.configuration_auto": lambda _: importlib.import_module(configuration),
        "transformers.models.auto.modeling_auto": register_models,
        "transformers.models.auto.image_processing_auto": register_image_processors,
    }
    for name, register in registrations.items():
        if name in sys.modules:
            register(sys.modules[name])
        else:
            sys.meta_path.insert(0, AfterImport(name, register))


def register_configuration(configuration_module: ModuleType) -> None:
    """Let `AutoConfig` find the configuration."""
    from transformers import AutoConfig

    config_class = configuration_module.ProScaleMask2FormerConfig
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def register_models(auto_module: ModuleType) -> None:
    """Let the Auto classes and pipelines for segmentation find the models."""
    config_class = sys.modules["proscale_hf"].ProScaleMask2FormerConfig
    segmenter = LazyModelClass("ProScaleMask2FormerForUniversalSegmentation", config_class)
    auto_module.AutoModel.register(
        config_class, LazyModelClass("ProScaleMask2FormerModel", config_class), exist_ok=True
    )
    segmentation_classes = (
        auto_module.AutoModelForUniversalSegmentation,
        auto_module.AutoModelForInstanceSegmentation,
        auto_module.AutoModelForImageSegmentation,  # what `pipeline("image-segmentation")` loads with
    )
    for auto_class in segmentation_classes:
        auto_class.register(config_class, segmenter, exist_ok=True)
    # pipelines look names up here, and warn about those that are missing
    auto_module.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES[config_class.model_type] = segmenter.__name__


def register_image_processors(auto_module: ModuleType) -> None:
    """Let `AutoImageProcessor` find the image processors whose backend is installed."""
    from transformers.utils import is_torchvision_available

    package = sys.modules["proscale_hf"]
    processors = {"pil": package.ProScaleMask2FormerImageProcessorPil}
    if is_torchvision_available():
        processors["torchvision"] = package.ProScaleMask2FormerImageProcessor
    auto_module.AutoImageProcessor.register(
        package.ProScaleMask2FormerConfig, image_processor_classes=processors, exist_ok=True
    )


def image_processor_class() -> type:
    """The image processor of the installed backend: torchvision's, or else Pillow's."""
    from transformers.utils import is_torchvision_available

    package = sys.modules["proscale_hf"]
    if is_torchvision_available():
        return package.ProScaleMask2FormerImageProcessor
    return package.ProScaleMask2FormerImageProcessorPil


class LazyModelClass:
    """Stands for a model class of this package and loads it when anything but its name is needed.

    Args:
        name: a public name of the package.
        config_class: the model's configuration class.
    """

    def __init__(self, name: str, config_class: type):
        self.__name__ = name
        self.config_class = config_class

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._load(), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._load()(*args, **kwargs)

    def _load(self) -> type:
        return getattr(sys.modules["proscale_hf"], self.__name__)


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module, right after the module was imported for the first time.

    Args:
        name: of the module.
        function: what to call.
    """

    def __init__(self, name: str, function: Callable[[ModuleType], None]):
        self.name = name
        self.function = function

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            self.function(module)

        spec.loader.exec_module = execute_and_call
        return spec
