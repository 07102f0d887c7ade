"""Augmentation: the recipes Mask2Former and PRO-SCALE were trained with, as torchvision v2 transforms.

torchvision's parts are used where they compute what the recipes need. Own steps are three: resizing and cropping in
one, and the colour jitter, for the reasons that docs/augmentation.md gives, and filling up to a size.

Targets are packed masks (`packed_masks.py`): planes of an image that hold one bit for each object.
"""

import difflib
import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.image_utils import SizeDict

from proscale_hf.processing.sizes import resized_size


try:
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as F
except ImportError as error:
    raise ImportError('augmentation needs torchvision: pip install "proscale-hf[train]"') from error

Size = tuple[int, int]  # (height, width)
Window = tuple[int, int, int, int]  # (top, left, height, width)

GREY = 128  # of what is filled up
CROP_ATTEMPTS = 10  # at a window that keeps to `single_category_max_area`; the last one is taken as it is

# Half-widths and ranges of the colour jitter of SSD (https://arxiv.org/abs/1512.02325), for values of 0 to 1.
BRIGHTNESS_OFFSET = 32 / 255
CONTRAST_FACTORS = (0.5, 1.5)
SATURATION_FACTORS = (0.5, 1.5)
HUE_TURNS = 18 / 180


@dataclass(frozen=True)
class Augmentation:
    """Applies a torchvision v2 transform to an image and its packed masks.

    Args:
        transform: any v2 transform that keeps images uint8, `v2.Compose([...])` for instance. It is called with a
            `tv_tensors.Image`, a `tv_tensors.Mask` (the planes) and `ClassLabels`. Steps that resize or rotate masks
            must take nearest neighbours, as v2's own do: bits cannot be averaged.
    """

    transform: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def __call__(
        self, image: torch.Tensor, planes: torch.Tensor, class_labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            image: (3, height, width) uint8.
            planes: (planes, height, width) uint8 packed masks.
            class_labels: (objects,) int64.

        Returns:
            Image and planes of the same new height and width. Objects may have lost all of their pixels.
        """
        image, planes, _ = self.transform(
            tv_tensors.Image(image), tv_tensors.Mask(planes), class_labels.as_subclass(ClassLabels)
        )
        return image.as_subclass(torch.Tensor), planes.as_subclass(torch.Tensor)


class ClassLabels(tv_tensors.TVTensor):
    """(objects,) int64. Transforms see them, and give them on as they are."""


def build_augmentation(settings: Mapping[str, Any]) -> Augmentation:
    """Makes an augmentation of settings as a recipe file has them.

    Args:
        settings: `name` is one of `large_scale_jitter`, `short_edge_crop` and `resize`, the other keys are the
            arguments of the function of that name in this file.

    Raises:
        ValueError: an unknown name or key, or a value that makes no sense; one line that says which.
    """
    recipes = {recipe.__name__: recipe for recipe in (large_scale_jitter, short_edge_crop, resize)}
    if not isinstance(settings, Mapping) or "name" not in settings:
        raise ValueError(f"augmentation: give `name`, one of {', '.join(recipes)}; got {settings!r}")
    name = settings["name"]
    if name not in recipes:
        raise ValueError(f"augmentation: there is no {name!r}{nearest(name, recipes)}; choose of {', '.join(recipes)}")
    arguments = {key: value for key, value in settings.items() if key != "name"}
    known = list(inspect.signature(recipes[name]).parameters)
    for key in arguments:
        if key not in known:
            raise ValueError(f"augmentation: {name} has no {key!r}{nearest(key, known)}; it has {', '.join(known)}")
    return recipes[name](**arguments)


def large_scale_jitter(
    scale: Sequence[float] = (0.1, 2.0), size: Sequence[int] = (1024, 1024), flip: float = 0.5, pad: bool = False
) -> Augmentation:
    """Large-scale jitter and a crop, the recipe for COCO (https://arxiv.org/abs/2012.07177).

    Args:
        scale: least and largest factor on `size`. The image is resized to fit into that box.
        size: (height, width). What sticks out of it is cropped away.
        flip: probability of mirroring left and right.
        pad: fill smaller images up to `size`, see `FillUp`.
    """
    check_share("flip", flip)
    check_switch("pad", pad)
    check_list("scale", scale, "[least, largest]", int | float)
    if scale[0] > scale[1]:
        raise ValueError(f"augmentation: scale must be [least, largest], got {scale!r}")
    check_list("size", size, "[height, width]")
    steps = [v2.RandomHorizontalFlip(flip), LargeScaleJitter(tuple(scale), tuple(size))]
    return Augmentation(v2.Compose([*steps, FillUp(tuple(size))] if pad else steps))


def short_edge_crop(
    short_edge: Sequence[int] = tuple(int(0.1 * tenths * 1024) for tenths in range(5, 21)),
    longest_edge: int = 4096,
    crop: Sequence[int] = (512, 1024),
    single_category_max_area: float = 1.0,
    color_jitter: bool = True,
    flip: float = 0.5,
    pad: bool = False,
) -> Augmentation:
    """A random size, a random crop and random colours, the recipe for Cityscapes and ADE20K.

    Args:
        short_edge: lengths in pixels of the image's short edge to choose from.
        longest_edge: pixels; where the long edge would get longer, the image is resized to this one instead.
        crop: (height, width) of the window. Of smaller images, all is kept.
        single_category_max_area: below 1, a window is drawn again, 10 times at most, if it has but one class, or
            one with this share or more of the labelled area.
        color_jitter: change brightness, contrast, saturation and hue as SSD does.
        flip: probability of mirroring left and right.
        pad: fill smaller images up to `crop`, see `FillUp`.
    """
    check_share("flip", flip)
    check_list("short_edge", short_edge, "a list of lengths")
    check_positive("longest_edge", longest_edge)
    check_list("crop", crop, "[height, width]")
    check_share("single_category_max_area", single_category_max_area)
    check_switch("color_jitter", color_jitter)
    check_switch("pad", pad)
    steps = [
        v2.RandomHorizontalFlip(flip),
        ShortEdgeCrop(tuple(short_edge), longest_edge, tuple(crop), single_category_max_area),
    ]
    if color_jitter:
        steps.append(ColorJitter())
    if pad:
        steps.append(FillUp(tuple(crop)))
    return Augmentation(v2.Compose(steps))


def resize(short_edge: int = 800, longest_edge: int = 1333, flip: float = 0.5) -> Augmentation:
    """The size that images have at inference, and a flip: a quiet default for fine-tuning.

    Args:
        short_edge: pixels.
        longest_edge: pixels; where the long edge would get longer, the image is resized to this one instead.
        flip: probability of mirroring left and right.
    """
    check_share("flip", flip)
    check_positive("short_edge", short_edge)
    check_positive("longest_edge", longest_edge)
    whole = (longest_edge, longest_edge)
    return Augmentation(v2.Compose([v2.RandomHorizontalFlip(flip), ShortEdgeCrop((short_edge,), longest_edge, whole)]))


class ResizeAndCrop(v2.Transform):
    """Resizes, and keeps a window. Of masks no more than the window is made."""

    @abstractmethod
    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws `size`, (height, width) to resize to, and `window`, the part of it to keep."""

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        if isinstance(inpt, tv_tensors.Image):
            return F.crop(F.resize(inpt, params["size"], antialias=True), *params["window"])
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.wrap(resized_window(inpt, **params), like=inpt)
        return inpt


class LargeScaleJitter(ResizeAndCrop):
    """See `large_scale_jitter`."""

    def __init__(self, scale: tuple[float, float], size: Size):
        super().__init__()
        self.scale = scale
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        scale = uniform(*self.scale)
        box = SizeDict(max_height=scale * self.size[0], max_width=scale * self.size[1])
        size = resized_size(v2.query_size(flat_inputs), box)
        position = uniform(0, 1)  # the same on both axes, as in the original
        kept = [min(lengths) for lengths in zip(size, self.size, strict=True)]
        offsets = [round(position * (whole - part)) for whole, part in zip(size, kept, strict=True)]
        return {"size": size, "window": (*offsets, *kept)}


class ShortEdgeCrop(ResizeAndCrop):
    """See `short_edge_crop`."""

    def __init__(
        self, short_edge: tuple[int, ...], longest_edge: int, crop: Size, single_category_max_area: float = 1.0
    ):
        super().__init__()
        self.short_edge = short_edge
        self.longest_edge = longest_edge
        self.crop = crop
        self.single_category_max_area = single_category_max_area

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        short_edge = self.short_edge[random_index(len(self.short_edge))]
        image_size = v2.query_size(flat_inputs)
        size = resized_size(image_size, SizeDict(shortest_edge=short_edge, longest_edge=self.longest_edge))
        for _ in range(CROP_ATTEMPTS):
            window = self.random_window(size)
            if self.single_category_max_area >= 1 or self.is_mixed(flat_inputs, size, window):
                break
        return {"size": size, "window": window}

    def random_window(self, size: Size) -> Window:
        """A window of the crop's size, or of the image's where that is smaller, anywhere in the image."""
        kept = [min(lengths) for lengths in zip(size, self.crop, strict=True)]
        offsets = [random_index(whole - part + 1) for whole, part in zip(size, kept, strict=True)]
        return (*offsets, *kept)

    def is_mixed(self, flat_inputs: list[Any], size: Size, window: Window) -> bool:
        """Whether no class has `single_category_max_area` of the window's labelled area or more."""
        _, planes, class_labels = flat_inputs
        areas = object_areas(resized_window(planes, size, window), len(class_labels))
        class_areas = torch.bincount(class_labels, weights=areas, minlength=1)
        return bool(class_areas.max() < self.single_category_max_area * class_areas.sum())


class FillUp(v2.Transform):
    """Fills images up to one size, at the bottom and the right: with grey, which belongs to no object.

    So a batch has one size, and the model, the loss too, takes what was filled up for a part of the image.

    Args:
        size: (height, width) of the result; images must not be larger.
    """

    def __init__(self, size: Size):
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        return {"padding": [0, 0, self.size[1] - width, self.size[0] - height]}  # left, top, right, bottom

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        if isinstance(inpt, ClassLabels) or not any(params["padding"]):
            return inpt
        return F.pad(inpt, **params, fill=GREY if isinstance(inpt, tv_tensors.Image) else 0)


class ColorJitter(v2.Transform):
    """The colour jitter of SSD, each of its four steps with probability 0.5.

    Brightness is shifted, contrast is a factor on all values, saturation a factor on that of HSV, hue is turned.
    Contrast comes before saturation and hue or after them, with equal probability.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        ranges = {
            "brightness": (-BRIGHTNESS_OFFSET, BRIGHTNESS_OFFSET),
            "contrast": CONTRAST_FACTORS,
            "saturation": SATURATION_FACTORS,
            "hue": (-HUE_TURNS, HUE_TURNS),
        }
        amounts = {name: uniform(*limits) for name, limits in ranges.items() if random_index(2)}
        order = ["brightness", "saturation", "hue"]
        order.insert(1 if random_index(2) else 3, "contrast")
        return {name: amounts[name] for name in order if name in amounts}

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        steps = {
            "brightness": shift_brightness,
            "contrast": F.adjust_brightness,  # torchvision's name for a factor on all values
            "saturation": scale_saturation,
            "hue": F.adjust_hue,
        }
        image = F.to_dtype(inpt.as_subclass(torch.Tensor), torch.float32, scale=True)
        for name, amount in params.items():
            image = steps[name](image, amount)
        return tv_tensors.wrap(F.to_dtype(image, torch.uint8, scale=True), like=inpt)


def shift_brightness(image: torch.Tensor, offset: float) -> torch.Tensor:
    """(3, height, width) values of 0 to 1, plus an offset."""
    return (image + offset).clamp_(0, 1)


def scale_saturation(image: torch.Tensor, factor: float) -> torch.Tensor:
    """(3, height, width) values of 0 to 1 with the saturation of HSV multiplied, up to 1; hue and value stay."""
    value, least = image.amax(0), image.amin(0)
    largest_factor = value / (value - least).clamp(min=torch.finfo(image.dtype).tiny)  # of a saturation of 1
    return value - (value - image) * largest_factor.clamp(max=factor)


def resized_window(planes: torch.Tensor, size: Size, window: Window) -> torch.Tensor:
    """A window of resized planes, by nearest neighbours (of pixel centres), without making the rest of them.

    Args:
        planes: (planes, height, width) uint8.
        size: (height, width) that the planes are resized to.
        window: part of the resized planes.

    Returns:
        (planes, window's height, window's width).
    """
    rows, columns = (
        (2 * np.arange(start, start + length) + 1) * old // (2 * new)
        for start, length, old, new in zip(window[:2], window[2:], planes.shape[1:], size, strict=True)
    )
    rows, row_of_each = np.unique(rows, return_inverse=True)  # so that a row is stretched once
    resized = np.empty((len(planes), *window[2:]), dtype=np.uint8)
    for source, target in zip(planes.numpy(), resized, strict=True):  # what is made on the way is one plane at a time
        target[:] = source[rows].take(columns, axis=1).take(row_of_each, axis=0)
    return torch.from_numpy(resized)


def object_areas(planes: torch.Tensor, objects: int) -> torch.Tensor:
    """(objects,) number of pixels of each object in (planes, height, width) packed masks, void ones left out."""
    known = planes * (planes[0] & 1 == 0)
    areas = torch.stack([(known >> bit & 1).sum((1, 2)) for bit in range(8)], dim=1)  # (planes, bits)
    return areas.flatten()[1 : objects + 1]  # the first bit is void


def uniform(low: float, high: float) -> float:
    """A random number from torch's generator."""
    return low + (high - low) * torch.rand((), dtype=torch.float64).item()


def random_index(count: int) -> int:
    """A random one of 0 to `count` - 1 from torch's generator."""
    return int(torch.randint(count, ()))


def nearest(name: Any, known: Sequence[str]) -> str:
    """The question whether a known name was meant, if there is one that is close."""
    matches = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def check_share(key: str, value: Any) -> None:
    """Raises a ValueError unless `value` is a number of 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"augmentation: {key} must be a number from 0 to 1, got {value!r}")


def check_switch(key: str, value: Any) -> None:
    """Raises a ValueError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"augmentation: {key} must be true or false, got {value!r}")


def check_positive(key: str, value: Any, number_type: type = int) -> None:
    """Raises a ValueError unless `value` is a positive, finite number of that type."""
    if isinstance(value, bool) or not isinstance(value, number_type) or not 0 < value < math.inf:
        kind = "whole number" if number_type is int else "number"
        raise ValueError(f"augmentation: {key} must be a positive {kind}, got {value!r}")


def check_list(key: str, values: Any, form: str, number_type: type = int) -> None:
    """Raises a ValueError unless `values` is a list of positive numbers, not empty, and of two if `form` says so."""
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list or not values or ("," in form and len(values) != 2):
        raise ValueError(f"augmentation: {key} must be {form}, got {values!r}")
    for value in values:
        check_positive(key, value, number_type)
