"""The families of models, by the type that a model's configuration names.

The table has names only: nothing is imported before a class is asked for. A family lives in a folder of
`proscale_hf/models`. Its modules are named as in transformers, by the model type; its classes begin alike.
"""

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """
    Where the classes of a family are.

    Args:
        model_type: of its configuration.
        folder: in `proscale_hf/models`.
        class_prefix: what the names of its classes begin with.
    """

    model_type: str
    folder: str
    class_prefix: str

    @property
    def config_class(self) -> type:
        """The configuration."""
        return self.load("configuration", f"{self.class_prefix}Config")

    @property
    def image_processor_classes(self) -> dict[str, type]:
        """The image processors by backend."""
        name = f"{self.class_prefix}ImageProcessor"
        return {
            "pil": self.load("image_processing", f"{name}Pil"),
            "torchvision": self.load("image_processing", name),
        }

    def model_class(self, auto_class: str) -> type:
        """The model that an Auto class such as "AutoModel" stands for."""
        return self.load("modeling", self.config_class.auto_classes[auto_class])

    @property
    def task_class(self) -> type:
        """The model with its heads, for the family's first task."""
        return self.model_class(next(name for name in self.config_class.auto_classes if name != "AutoModel"))

    def is_preset(self, name: str) -> bool:
        """Whether the configuration's `from_preset` knows a name."""
        return name in importlib.import_module(f"proscale_hf.models.{self.folder}.presets").NAMES

    def module(self, kind: str) -> str:
        """The name of a module: of the "configuration", "modeling" or "image_processing"."""
        return f"proscale_hf.models.{self.folder}.{kind}_{self.model_type}"

    def load(self, kind: str, name: str) -> type:
        """A class of one of the modules, which is imported for it."""
        return getattr(importlib.import_module(self.module(kind)), name)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("proscale_mask2former", folder="mask2former", class_prefix="ProScaleMask2Former"),
        Family("proscale_dino", folder="dino", class_prefix="ProScaleDino"),
    )
}
