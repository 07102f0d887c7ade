"""What the configurations of all families share: short names, categories, and the code that is saved with them."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from proscale_hf.hub.code import nearest_of_ours, reference, write_code
from proscale_hf.models.installed import resolved


class ProScaleConfigMixin:
    """
    The common part of the configurations, in front of transformers' `PreTrainedConfig`.

    A family's configuration has the fields `categories` and `weights_license`, and says in `auto_classes` which of its
    models each of transformers' Auto classes stands for. `preset_settings` gives the fields that a preset's name stands
    for; it is None in the code that leaves with a model.
    """

    preset_settings: ClassVar[Callable[[str], dict[str, Any]] | None] = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "ProScaleConfigMixin":
        """As in transformers, and also by the short name of a published model, see `names.py`."""
        with resolved(pretrained_model_name_or_path) as source:
            return super().from_pretrained(source, **kwargs)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "ProScaleConfigMixin":
        """
        The configuration of a new model by name.

        Args:
            name: see the family's `presets.py`.
            changes: fields with values of your own.

        Raises:
            ValueError: there is no such preset, or a value is not possible.
            ImportError: the configuration's code came with a model, and the package is not installed.
        """
        if cls.preset_settings is None:
            raise ImportError("Presets do not come with a model's code; install the package proscale_hf for them.")
        return cls(**{**cls.preset_settings(name), **changes})

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would copy the code of classes that are marked so; here `save_pretrained` writes it."""

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers; the folder also gets the code. Where another repository's code is, is not handed on."""
        config_class = nearest_of_ours(type(self))
        self.auto_map = {"AutoConfig": reference(config_class)}
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_code(save_directory, config_class)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def stuff_label_ids(self, unsaid: Iterable[int] | None = None) -> Iterable[int] | None:
        """
        The labels that are stuff, not countable things.

        Args:
            unsaid: what to return if no category says whether it is a thing.

        Returns:
            Those whose category says `"isthing": 0`; a label without a category of its name is a thing.
        """
        if not any("isthing" in category for category in self.categories or ()):
            return unsaid
        return [label for label in sorted(self.id2label) if (self.category(label) or {}).get("isthing") == 0]

    def category(self, label_id: int) -> dict[str, Any] | None:
        """
        The entry of `categories` for a label.

        Args:
            label_id: The label, as in `id2label`.

        Returns:
            The category, or None if there is none, or if its name is not the label's, as after fine-tuning on other
            labels.
        """
        if self.categories is None or not 0 <= label_id < len(self.categories):
            return None
        category = self.categories[label_id]
        return category if category["name"] == self.id2label.get(label_id) else None
