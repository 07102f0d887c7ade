"""The data sets that this package knows, by name."""

import inspect
import re
from typing import Any, Literal, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator

from proscale_hf.data.dataset import SegmentationDataset, SegmentationSource
from proscale_hf.data.sources.ade20k import Ade20k
from proscale_hf.data.sources.cityscapes import Cityscapes
from proscale_hf.data.sources.coco import CocoInstance, CocoPanoptic
from proscale_hf.data.sources.folder import ImageFolder
from proscale_hf.data.sources.hub_dataset import HubDataset


SOURCE_CLASSES: dict[str, type[SegmentationSource]] = {
    "coco_panoptic": CocoPanoptic,
    "coco_instance": CocoInstance,
    "cityscapes": Cityscapes,
    "ade20k": Ade20k,
    "folder": ImageFolder,
    "hub": HubDataset,
}


def open_dataset(name: str, *, on_error: Literal["raise", "skip"] = "raise", **options: Any) -> SegmentationDataset:
    """Open a data set by name.

    Args:
        name: one of `SOURCE_CLASSES`.
        on_error: see `SegmentationDataset`.
        options: what the data set's class takes; `root` and `split` mostly.

    Raises:
        ValueError: there is no such data set or option, an option is missing, or the data cannot be read; one line.
    """
    if name not in SOURCE_CLASSES:
        raise ValueError(f"There is no data set {name!r}; known are {', '.join(SOURCE_CLASSES)}.")
    source_class = SOURCE_CLASSES[name]
    parameters = inspect.signature(source_class).parameters
    if unknown := sorted(set(options) - set(parameters)):
        raise ValueError(f"{name} has no option {', '.join(unknown)}; it takes {', '.join(parameters)}.")
    needed = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    if missing := [key for key in needed if key not in options]:
        raise ValueError(f"{name} needs the option {', '.join(missing)}; it takes {', '.join(parameters)}.")
    types = get_type_hints(source_class.__init__)
    for key, value in options.items():
        check_type(name, key, value, types[key])
    return SegmentationDataset(source_class(**options), on_error=on_error)


def check_type(name: str, option: str, value: Any, expected: Any) -> None:
    """Raises a ValueError unless a value, from a recipe or a command line, is of the type that an option must have."""
    if get_origin(expected) is Literal:  # the class names the choices itself
        return
    try:
        type_validator(option, value, expected)
    except TypeError:
        types = re.sub(r"\b[a-z.]+\.(?=[A-Z])", "", inspect.formatannotation(expected))  # without their modules
        hint = " Put a name that looks like a number in quotes." if isinstance(value, int | float) else ""
        raise ValueError(f"{option} of {name} must be {types}, got {value!r}.{hint}") from None
