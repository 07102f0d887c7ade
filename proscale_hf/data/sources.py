"""The data sets that this package knows, by name."""

import inspect
from typing import Any, Literal

from .coco import CocoInstance, CocoPanoptic
from .folder import ImageFolder
from .hub_dataset import HubDataset
from .source import SegmentationDataset, SegmentationSource


SOURCE_CLASSES: dict[str, type[SegmentationSource]] = {
    "coco_panoptic": CocoPanoptic,
    "coco_instance": CocoInstance,
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
    return SegmentationDataset(source_class(**options), on_error=on_error)
