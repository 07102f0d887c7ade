"""Whether a data set has an object at all. Without one, a training runs to its end and learns nothing."""

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from proscale_hf.data.collate import TransformedDataset
from proscale_hf.data.dataset import SegmentationDataset
from proscale_hf.data.sample import Sample
from proscale_hf.processing.packed_masks import present_objects


def check_objects(dataset: Any) -> None:
    """Refuse a data set in which nothing can be learned.

    It is read until the first object is found, in an order that is random, but always the same.

    Args:
        dataset: of samples, or of the model's inputs, also seen through a `TransformedDataset`. Of one without a
            length, or with other entries, nothing is known, so it passes.

    Raises:
        ValueError: no image has an object; one line.
        SampleError: an image or annotation cannot be used, and `on_error` of its data set is "raise".
    """
    if isinstance(dataset, TransformedDataset):
        dataset = dataset.dataset
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return
    with _unchanged_random_numbers():
        for index in np.random.default_rng(0).permutation(len(dataset)).tolist():
            if isinstance(dataset, SegmentationDataset) and dataset.source.says_empty(dataset.rows[index]):
                continue
            if _has_object(dataset[index]) is not False:
                return
    raise ValueError(
        f"there is nothing to train on: none of the {len(dataset)} images has an object. Crowds and void are no "
        "objects, and the mask of an object has the value 1, not 255"
    )


def _has_object(entry: Any) -> bool | None:
    """Whether an entry of a data set has an object; None where that cannot be known."""
    if isinstance(entry, Sample):
        return entry.has_object()
    if not isinstance(entry, Mapping) or entry.get("class_labels") is None:
        return None
    objects = len(entry["class_labels"])
    if objects and entry.get("packed_masks") is not None:
        return bool(present_objects(torch.as_tensor(entry["packed_masks"]), objects).any())
    if objects and entry.get("mask_labels") is not None:
        return any(bool((torch.as_tensor(mask) == 1).any()) for mask in entry["mask_labels"])
    return objects > 0


@contextlib.contextmanager
def _unchanged_random_numbers() -> Iterator[None]:
    """A data set may draw random numbers; training draws the same afterwards as without."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
