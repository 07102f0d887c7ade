"""Watches parts of a model while it works on one image, with hooks that are removed afterwards."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn


class Observation:
    """What parts of the model do with one image.

    Args:
        model: the segmentation model.
        image_processor: its image processor.
        image: what to look at.
        modules: parts of the model to watch.

    Attributes:
        calls: for each of `modules` a list with (arguments, result) of each call.
        size: (height, width) of the image as the model got it, without padding.
        outputs: what the model returned.
    """

    def __init__(self, model: Any, image_processor: Any, image: Image.Image, modules: Sequence[nn.Module] = ()):
        inputs = image_processor(images=[image], return_tensors="pt").to(model.device)
        if "pixel_mask" in inputs:
            self.size = tuple(int(inputs["pixel_mask"][0].any(axis).sum()) for axis in (1, 0))
        else:
            self.size = tuple(inputs["pixel_values"].shape[-2:])
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        self.calls: list[list[tuple[tuple, Any]]] = [[] for _ in modules]
        with contextlib.ExitStack() as stack, torch.inference_mode():
            for module, calls in zip(modules, self.calls, strict=True):
                hook = module.register_forward_hook(
                    lambda _, arguments, result, calls=calls: calls.append((arguments, result))
                )
                stack.callback(hook.remove)
            self.outputs = model(**inputs)

    def without_padding(self, feature_map: torch.Tensor, stride: int) -> torch.Tensor:
        """The part of a (..., height, width) map with this stride that shows the image."""
        height, width = (-(-side // stride) for side in self.size)
        return feature_map[..., :height, :width]
