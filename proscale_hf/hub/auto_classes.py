"""Makes `AutoConfig`, `AutoModel...`, `AutoImageProcessor` and pipelines find the classes of this package.

`import proscale_hf` should stay light, so nothing is registered before transformers' own module for it is imported.
It happens right after that, and again if that module is reloaded. A model's class is loaded when it is first read from
transformers' mapping, since transformers' base classes import torchvision. Image processors are loaded at once:
transformers' module for them imports torchvision anyway.
"""

import importlib
import importlib.abc
import sys
from collections import UserDict
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

from proscale_hf.hub.families import FAMILIES, Family


AUTO_MODULES = "transformers.models.auto"
NAMES_FOR_PIPELINES = {  # where pipelines look names up; they warn about those that are missing
    "AutoModelForUniversalSegmentation": "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "AutoModelForObjectDetection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
}


def register_with_auto_classes() -> None:
    """Register all families with transformers, each class as soon as that is possible. May be called again."""
    for family in FAMILIES.values():
        configuration = family.module("configuration")
        after_import(configuration, lambda _, family=family: register_configuration(family))
        after_import(f"{AUTO_MODULES}.configuration_auto", lambda _, family=family: bring_configuration(family))
        after_import(f"{AUTO_MODULES}.modeling_auto", lambda auto, family=family: register_models(family, auto))
        after_import(
            f"{AUTO_MODULES}.image_processing_auto", lambda auto, family=family: register_image_processors(family, auto)
        )


def register_configuration(family: Family) -> None:
    """Let `AutoConfig` find the configuration."""
    from transformers import AutoConfig

    AutoConfig.register(family.model_type, family.config_class, exist_ok=True)


def bring_configuration(family: Family) -> None:
    """Import the configuration. One that is being imported is registered afterwards, one that was before, now again."""
    module = importlib.import_module(family.module("configuration"))
    if hasattr(module, f"{family.class_prefix}Config"):
        register_configuration(family)


def register_models(family: Family, auto_module: ModuleType) -> None:
    """Let the Auto classes and pipelines find the models."""
    config_class = family.config_class
    for auto_class, name in config_class.auto_classes.items():
        mapping = getattr(auto_module, auto_class)._model_mapping
        if not isinstance(mapping._extra_content, ClassesLoadedWhenRead):
            mapping._extra_content = ClassesLoadedWhenRead(mapping._extra_content)
        mapping.register(config_class, ClassToLoad(family, name), exist_ok=True)
        if auto_class in NAMES_FOR_PIPELINES:
            getattr(auto_module, NAMES_FOR_PIPELINES[auto_class])[family.model_type] = name


def register_image_processors(family: Family, auto_module: ModuleType) -> None:
    """Let `AutoImageProcessor` find the image processors whose backend is installed."""
    from transformers.utils import is_torchvision_available

    processors = family.image_processor_classes
    if not is_torchvision_available():
        del processors["torchvision"]
    auto_module.AutoImageProcessor.register(family.config_class, image_processor_classes=processors, exist_ok=True)


def image_processor_class(model_type: str = "proscale_mask2former") -> type:
    """The image processor of a family for the installed backend: torchvision's, or else Pillow's."""
    from transformers.utils import is_torchvision_available

    return FAMILIES[model_type].image_processor_classes["torchvision" if is_torchvision_available() else "pil"]


class ClassToLoad(NamedTuple):
    """Names a model class of a family that nobody has read yet."""

    family: Family
    name: str


class ClassesLoadedWhenRead(UserDict):
    """Classes that were registered with one of transformers' mappings; each [`ClassToLoad`] is loaded when it is read.

    Whoever reads a class, from the mapping or as one of its values, gets the class itself.
    """

    def __getitem__(self, key: type) -> Any:
        value = self.data[key]
        if isinstance(value, ClassToLoad):
            value = self.data[key] = value.family.load("modeling", value.name)
        return value


def after_import(name: str, function: Callable[[ModuleType], Any]) -> None:
    """Call a function with a module: now if the module is imported already, and after each import and reload."""
    finder = next((finder for finder in sys.meta_path if isinstance(finder, AfterImport) and finder.name == name), None)
    if finder is None:
        finder = AfterImport(name)
        sys.meta_path.insert(0, finder)
    finder.functions.append(function)
    if name in sys.modules:
        function(sys.modules[name])


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls `functions` with a module, each time after its code has run.

    Args:
        name: of the module.
    """

    def __init__(self, name: str):
        self.name = name
        self.functions: list[Callable[[ModuleType], Any]] = []

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                execute(module)
                for function in self.functions:
                    function(module)

            spec.loader.exec_module = execute_and_call
        return spec
