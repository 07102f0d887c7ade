"""Any image as a (channels, height, width) array, for both backends of image processors.

An EXIF orientation is applied, transparency is laid over white, 16-bit values are brought to 8 bits, and grey
becomes RGB.
"""

import os
from typing import Any

import numpy as np
import torch
from transformers.image_utils import ChannelDimension, load_image

from proscale_hf.files.text import one_line


try:
    from PIL import Image, ImageOps
except ImportError:  # then images can be arrays and tensors only
    Image = None


def read_pixels(image: Any, channels: int | None, input_data_format: Any, name: str) -> np.ndarray:
    """
    Bring any image to a uint8 or float32 array of shape (channels, height, width).

    Args:
        image: PIL image, path, URL, or (height, width [, channels]) or (channels, height, width) array or
            tensor.
        channels: how many channels the result has; grey is repeated, transparency is laid over white. `None`: as
            many as the image has.
        input_data_format: where arrays have their channels; `None`: their shape tells.
        name: what error messages call the image.

    Raises:
        `ValueError`: the image cannot be read, is empty, or has another number of channels; one line.
    """
    if isinstance(image, str | os.PathLike) or (Image is not None and isinstance(image, Image.Image)):
        array = _pil_pixels(image, channels, name)
    elif isinstance(image, np.ndarray | torch.Tensor):
        array = _array_pixels(image, channels, input_data_format, name)
    else:
        raise ValueError(f"{name} is a {type(image).__name__}: give a PIL image, a path, a URL, an array or a tensor")
    if 0 in array.shape:
        raise ValueError(f"{name} is empty: its shape is {array.shape}")
    return array if array.dtype == np.uint8 else array.astype(np.float32, copy=False)


def _pil_pixels(image: Any, channels: int | None, name: str) -> np.ndarray:
    try:
        if not isinstance(image, Image.Image):
            # transformers' `load_image` clips the 16-bit values of a file
            image = Image.open(image) if os.path.isfile(image) else load_image(os.fspath(image))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray(_to_8_bit(np.asarray(image, dtype=np.uint16)))
        elif image.mode in ("I", "F"):  # no fixed range: the image's own becomes black to white
            values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
            values = (values - values.min()) / (np.ptp(values) or 1.0)
            image = Image.fromarray((values * 255).round().astype(np.uint8))
        if channels == 3:
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
        pixels = np.array(image)
    except Exception as error:  # what Pillow raises on damaged data depends on the format
        raise ValueError(f"{name} cannot be read: {one_line(error)[:200]}") from error
    return np.moveaxis(np.atleast_3d(pixels), -1, 0)


def _array_pixels(
    image: np.ndarray | torch.Tensor, channels: int | None, input_data_format: Any, name: str
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
    if image.dtype == np.uint16:
        image = _to_8_bit(image)
    elif image.dtype == bool:
        image = image.astype(np.uint8) * 255

    if channels is None or len(image) == channels or 0 in image.shape:
        return image
    if len(image) == 1:
        return np.repeat(image, channels, axis=0)
    if len(image) == 4 and channels == 3:
        white = 1.0 if image.dtype.kind == "f" and image.max() <= 1 else 255.0
        opacity = image[3] / white
        blended = opacity * image[:3] + (1 - opacity) * white
        return blended.round().astype(np.uint8) if image.dtype == np.uint8 else blended
    raise ValueError(f"{name} has {len(image)} channels, expected {channels}")


def _channel_format(image: np.ndarray, channels: int, is_tensor: bool, name: str) -> ChannelDimension:
    for count in (channels, 1, 4):
        first, last = image.shape[0] == count, image.shape[-1] == count
        if first or last:
            # where both are possible, the library's own convention decides
            return ChannelDimension.FIRST if first and (is_tensor or not last) else ChannelDimension.LAST
    raise ValueError(f"{name} has shape {image.shape}, in which neither the first nor the last axis can be channels")


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    return (values / 257).round().astype(np.uint8)
