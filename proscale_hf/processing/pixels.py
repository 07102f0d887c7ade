"""Any image as a (channels, height, width) array, for both backends of image processors.

An EXIF orientation is applied, and grey becomes RGB. `value_range.py` says which values are black and white.

Transparency is laid over white, where an image says that it has some: PIL images of a mode with opacity, and files
whose format knows it. The fourth channel of an array, or of a TIFF file that does not call it opacity, can be anything,
such as near infrared. It is left out, with a warning.
"""

import os
from typing import Any

import numpy as np
import torch
from transformers.image_utils import ChannelDimension

from proscale_hf.files.text import one_line
from proscale_hf.processing.picture_files import fetched, opened_picture
from proscale_hf.processing.value_range import EIGHT_BIT_FACTOR, say_once, to_eight_bits


try:
    from PIL import Image, ImageOps
except ImportError:  # then images can be arrays and tensors only
    Image = None


LONGEST_REASON = 200  # characters of a library's message
LEFT_OUT = (
    "The fourth channel of a picture is left out, since nothing says that it is opacity. "
    "If it is, give a PIL image of the mode RGBA."
)
TIFF_EXTRA_SAMPLES, TIFF_SAMPLE_FORMAT = 338, 339  # tags
TIFF_OPACITY, TIFF_UNSIGNED = (1, 2), 1  # their values


def read_pixels(
    image: Any,
    channels: int | None,
    input_data_format: Any,
    name: str,
    rescale_factor: float | None = EIGHT_BIT_FACTOR,
) -> np.ndarray:
    """
    Bring any image to a uint8 or float32 array of shape (channels, height, width), with values from 0 to 255.

    Args:
        image: PIL image, path, URL, or (height, width [, channels]) or (channels, height, width) array or
            tensor.
        channels: how many channels the result has; grey is repeated, transparency is laid over white. `None`: as
            many as the image has.
        input_data_format: where arrays have their channels; `None`: their shape tells.
        name: what error messages call the image.
        rescale_factor: what the caller multiplies the result with, `None` for nothing; see `value_range.py`.

    Raises:
        `ValueError`: the image cannot be read, is empty, or has another number of channels; one line.
    """
    if isinstance(image, str | os.PathLike) or (Image is not None and isinstance(image, Image.Image)):
        array = _pil_pixels(image, channels, rescale_factor, name)
    elif isinstance(image, np.ndarray | torch.Tensor):
        array = _array_pixels(image, channels, input_data_format, rescale_factor, name)
    else:
        raise ValueError(f"{name} is a {type(image).__name__}: give a PIL image, a path, a URL, an array or a tensor")
    if 0 in array.shape:
        raise ValueError(f"{name} is empty: its shape is {array.shape}")
    return array if array.dtype == np.uint8 else array.astype(np.float32, copy=False)


def _pil_pixels(image: Any, channels: int | None, rescale_factor: float | None, name: str) -> np.ndarray:
    try:
        if not isinstance(image, Image.Image):
            source = fetched(image)
            with opened_picture(source, f"{image}"[:LONGEST_REASON] if isinstance(source, bytes) else None) as picture:
                return upright_pixels(picture, channels, rescale_factor)
        return upright_pixels(image, channels, rescale_factor)
    except Exception as error:  # what Pillow raises on damaged data depends on the format
        raise ValueError(f"{name} cannot be read: {one_line(error)[:LONGEST_REASON]}") from error


def upright_pixels(
    image: "Image.Image", channels: int | None, rescale_factor: float | None = EIGHT_BIT_FACTOR
) -> np.ndarray:
    """As `read_pixels`, of a PIL image; what is wrong with it is said by Pillow's errors."""
    has_opacity, is_unsigned = image.has_transparency_data, False
    if (
        tags := getattr(image, "tag_v2", None)
    ) is not None:  # Pillow takes four channels for opacity, integers for signed
        has_opacity &= image.mode != "RGBA" or tags.get(TIFF_EXTRA_SAMPLES, (0,))[0] in TIFF_OPACITY
        is_unsigned = image.mode == "I" and tags.get(TIFF_SAMPLE_FORMAT, (TIFF_UNSIGNED,))[0] == TIFF_UNSIGNED
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        values = values.view(np.uint32) if is_unsigned else values
        return np.repeat(to_eight_bits(values, rescale_factor)[None], channels or 1, axis=0)
    if channels == 3:
        if has_opacity:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        elif image.mode == "RGBA":
            say_once(LEFT_OUT)
        image = image.convert("RGB")
    return np.moveaxis(np.atleast_3d(to_eight_bits(np.array(image))), -1, 0)


def _array_pixels(
    image: np.ndarray | torch.Tensor,
    channels: int | None,
    input_data_format: Any,
    rescale_factor: float | None,
    name: str,
) -> np.ndarray:
    if image.ndim not in (2, 3):
        raise ValueError(f"{name} has {image.ndim} dimensions: give (height, width), with or without channels")
    is_tensor = isinstance(image, torch.Tensor)
    if is_tensor:
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if image.ndim == 2:
        image = image[None]
    elif (input_data_format or _channel_format(image, channels or 3, is_tensor, name)) == ChannelDimension.LAST:
        image = np.moveaxis(image, -1, 0)
    if len(image) == 4 and channels == 3:
        say_once(LEFT_OUT)
        image = image[:3]
    if channels is not None and len(image) not in (1, channels) and 0 not in image.shape:
        raise ValueError(f"{name} has {len(image)} channels, expected {channels}")
    try:
        image = to_eight_bits(image, rescale_factor)
    except ValueError as error:
        raise ValueError(f"{name} cannot be used: {error}") from error
    return np.repeat(image, channels, axis=0) if len(image) == 1 and channels is not None else image


def _channel_format(image: np.ndarray, channels: int, is_tensor: bool, name: str) -> ChannelDimension:
    for count in (channels, 1, 4):
        first, last = image.shape[0] == count, image.shape[-1] == count
        if first or last:
            # where both are possible, the library's own convention decides
            return ChannelDimension.FIRST if first and (is_tensor or not last) else ChannelDimension.LAST
    raise ValueError(f"{name} has shape {image.shape}, in which neither the first nor the last axis can be channels")
