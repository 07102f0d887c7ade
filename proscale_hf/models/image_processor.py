"""What the image processors of all families share: pictures become a padded batch, with Pillow or with torchvision.

A family's own mixin derives from `ImageProcessorMixin` and adds labels and post-processing. Its two classes also derive
from `PillowPixels` and `TorchvisionPixels`, which hold all that the two backends do differently.

The steps are the original's (detectron2's test-time resize and Mask2Former's padding): shortest edge 800, longest 1333;
normalise; pad with zeros at the right and the bottom to the largest image of the batch, and to a multiple of 32.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import IMAGE_PROCESSOR_NAME, requires_backends

from proscale_hf.hub.card_mark import CARD_NAME
from proscale_hf.hub.code import reference, write_code
from proscale_hf.hub.upload import HubRepository, split_hub_arguments
from proscale_hf.models.installed import renew_card, resolved
from proscale_hf.processing.pixels import read_pixels
from proscale_hf.processing.settings import SettingsError, check_settings
from proscale_hf.processing.sizes import ImageSizes, pixel_mask, resized_size, sizes_in_batch


try:
    from PIL import Image
except ImportError:  # transformers' PilBackend says so when it is used
    Image = None


class PaddedImagesKwargs(ImagesKwargs, total=False):
    """
    Settings beyond those of every image processor; all are saved in `preprocessor_config.json`.

    size_divisor (`int`, *optional*, defaults to 32):
        The padded height and width are multiples of it; 0 or 1 for any size. `pad_size` is taken as it is.
    """

    size_divisor: int


class ImageProcessorMixin:
    """
    Makes a padded batch of images. A backend adds `_normalized_batch`, and a family `config_class`, `backends` and
    `_labels`.

    Images: PIL images of any mode, paths, URLs, arrays and tensors. An EXIF orientation is applied (sizes of targets
    and labels are those of the upright image), transparency is laid over white, and grey becomes RGB. Values become
    0 to 255 by the rule of `processing/value_range.py`, before `rescale_factor` is applied.
    """

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 800, "longest_edge": 1333}  # noqa: RUF012 - transformers copies class defaults
    default_to_square = False
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    size_divisor = 32
    resize_rule = staticmethod(resized_size)
    model_input_names = ["pixel_values", "pixel_mask", "image_sizes"]  # noqa: RUF012

    def __init__(self, **kwargs: Any):
        kwargs = self._translate_old_names(kwargs)
        check_settings(kwargs)
        super().__init__(**kwargs)

    @staticmethod
    def backends() -> tuple[type, type]:
        """The image processors of the family with Pillow and with torchvision, in the order `auto_map` has them."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "ImageProcessorMixin":
        """As in transformers, and also by the short name of a published model, see `names.py`.

        Raises:
            `ValueError`: a saved setting has a value that is not possible; one line that names it and the file.
        """
        with resolved(pretrained_model_name_or_path) as source:
            try:
                return super().from_pretrained(source, **kwargs)
            except SettingsError as error:
                raise SettingsError(f"{IMAGE_PROCESSOR_NAME} of {source}: {error}") from error

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoImageProcessor") -> None:
        """Nothing: transformers would copy the code of classes that are marked so; here `save_pretrained` writes it."""

    def to_dict(self) -> dict[str, Any]:
        """The settings, as in transformers, and where the code for both backends is."""
        settings = super().to_dict()
        settings["auto_map"] = {"AutoImageProcessor": [reference(backend) for backend in self.backends()]}
        return settings

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """
        As in transformers, with the code. A model card in the folder that nobody has edited tells of these settings;
        the costs in it stay those of the image that they were measured for, until the model is saved again.
        """
        hub_arguments = {"commit_message": "Upload image processor", **split_hub_arguments(kwargs, save_directory)}
        repository = HubRepository(**hub_arguments) if push_to_hub else None
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_code(save_directory, *self.backends())
        files = super().save_pretrained(save_directory, **kwargs)
        renew_card(save_directory, self.config_class)
        if repository is not None:
            with tempfile.TemporaryDirectory() as folder:
                self.save_pretrained(folder, **kwargs)
                repository.upload(folder, card=Path(save_directory, CARD_NAME))
        return files

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload image processor",
        max_shard_size: int | str | None = None,
        tags: list[str] | str | None = None,
        **hub_arguments: Any,
    ) -> CommitInfo:
        """As in transformers, with the code, and without a model card: that is the model's (so `tags` is not read)."""
        repository = HubRepository(repo_id, commit_message=commit_message, **hub_arguments)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return repository.upload(folder)

    def preprocess(self, images: ImageInput, *annotations: Any, **kwargs: Any) -> BatchFeature:
        """
        Make a padded batch. One image or a list of them; an array may have a leading batch dimension.

        Args:
            images: see the class.
            annotations: what the family makes labels of.
            kwargs: settings of the processor, for this call.

        Returns:
            `BatchFeature`: `pixel_values` float32 (batch, channels, height, width); `pixel_mask` int64
            (batch, height, width), 1 where the image is; `image_sizes` int64 (batch, 2), height and width of each
            image in the batch, without padding; the family's labels, if there are annotations. Tensors or arrays as
            `return_tensors` says, by default what the backend works with.

        Raises:
            `ValueError`: one line that names the image at fault.
        """
        kwargs = self._translate_old_names(kwargs)
        check_settings(kwargs)
        return super().preprocess(images, *annotations, **kwargs)

    def _translate_old_names(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Understand `max_size`, which older configurations and scripts still use."""
        kwargs = dict(kwargs)
        max_size = kwargs.pop("max_size", None)
        if max_size is not None and not isinstance(kwargs.get("size"), dict | SizeDict | list | tuple):
            shortest_edge = kwargs.get("size") or self.size["shortest_edge"]
            kwargs["size"] = {"shortest_edge": shortest_edge, "longest_edge": max_size}
        return kwargs

    def _preprocess_image_like_inputs(self, images: ImageInput, *annotations: Any, **settings: Any) -> BatchFeature:
        """Called by transformers' `preprocess`, with all settings."""
        images = _flat_list(images)
        if not images:
            raise ValueError("got no images: give at least one")
        if settings.get("device") is None and isinstance(images[0], torch.Tensor):
            settings["device"] = images[0].device
        pictures = _read(images, **settings)
        sizes = sizes_in_batch(
            [picture.shape[1:] for picture in pictures],
            settings["size"] if settings["do_resize"] else None,
            settings["pad_size"],
            settings["size_divisor"] or 1,
            self.resize_rule,
        )
        tensor_type = settings["return_tensors"] or ("np" if self.backend == "pil" else "pt")
        pixel_values = self._normalized_batch(pictures, sizes, **settings)
        facts = {"pixel_mask": pixel_mask(sizes), "image_sizes": np.array([size.resized for size in sizes])}
        batch = BatchFeature({"pixel_values": pixel_values, **facts}, tensor_type=tensor_type)
        if tensor_type == "pt":
            device = batch["pixel_values"].device
            for name in facts:
                batch[name] = batch[name].to(device)
        for name, arrays in self._labels(*annotations, sizes=sizes, settings=settings).items():
            if tensor_type == "pt":
                arrays = [torch.from_numpy(array).to(device) for array in arrays]
            batch[name] = arrays
        return batch

    def _labels(
        self, *annotations: Any, sizes: list[ImageSizes], settings: dict[str, Any]
    ) -> dict[str, list[np.ndarray]]:
        """Labels for training, by name: a list with an array for each image. None without annotations."""
        raise NotImplementedError


class PillowPixels(PilBackend):
    """Pixels of a batch, made by Pillow and numpy on the CPU."""

    def _normalized_batch(
        self,
        pictures: list[np.ndarray],
        sizes: list[ImageSizes],
        *,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        **_: Any,
    ) -> np.ndarray:
        """Resize, rescale, normalise and pad (channels, height, width) pictures, one after the other."""
        batch = np.zeros((len(pictures), len(pictures[0]), *sizes[0].padded), dtype=np.float32)
        for target, picture, image_sizes in zip(batch, pictures, sizes, strict=True):
            height, width = image_sizes.resized
            if image_sizes.original != image_sizes.resized:
                channels = [Image.fromarray(channel).resize((width, height), resample) for channel in picture]
                picture = np.stack([np.asarray(channel) for channel in channels])
            if do_rescale:
                picture = self.rescale(picture, rescale_factor)
            if do_normalize:
                picture = self.normalize(picture, image_mean, image_std)
            target[:, :height, :width] = picture
        return batch


class TorchvisionPixels(TorchvisionBackend):
    """Pixels of a batch, made by torchvision, on the CPU or a GPU."""

    def __init__(self, **kwargs: Any):
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)

    def _normalized_batch(
        self,
        pictures: list[np.ndarray],
        sizes: list[ImageSizes],
        *,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        device: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """Resize, rescale, normalise and pad (channels, height, width) pictures, one after the other."""
        batch = torch.zeros((len(pictures), len(pictures[0]), *sizes[0].padded), device=device)
        for target, picture, image_sizes in zip(batch, pictures, sizes, strict=True):
            height, width = image_sizes.resized
            picture = torch.from_numpy(np.ascontiguousarray(picture)).to(device)
            if image_sizes.original != image_sizes.resized:
                picture = self.resize(picture, SizeDict(height=height, width=width), resample=resample)
            target[:, :height, :width] = self.rescale_and_normalize(
                picture, do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
        return batch


def output_field(outputs: Any, name: str) -> Any:
    """A field of a model's outputs, which may be an object or a mapping; None if it is not there."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _flat_list(images: Any) -> list:
    if isinstance(images, list | tuple):
        return [image for item in images for image in _flat_list(item)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _read(
    images: list,
    *,
    do_convert_rgb: bool | None,
    do_rescale: bool | None,
    rescale_factor: float,
    image_mean: Any,
    input_data_format: Any,
    **_: Any,
) -> list[np.ndarray]:
    """Each image as (channels, height, width); with `do_convert_rgb` of as many channels as `image_mean` has."""
    channels = None
    if do_convert_rgb:
        channels = len(image_mean) if isinstance(image_mean, Sequence) else 3
    factor = rescale_factor if do_rescale else None
    return [
        read_pixels(image, channels, input_data_format, f"image {index}", factor) for index, image in enumerate(images)
    ]
