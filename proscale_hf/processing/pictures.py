"""Image files: photographs are read as 8-bit RGB, and pictures are written."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from proscale_hf.files.whole import write_whole
from proscale_hf.processing.picture_files import opened_picture
from proscale_hf.processing.pixels import upright_pixels


PICTURE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}


def load_image(path: str | os.PathLike | bytes, name: str | None = None) -> Image.Image:
    """Read an image file as an upright 8-bit RGB picture.

    An animation gives its first frame. `pixels.py` says what becomes of transparency, `value_range.py` what becomes of
    values that are not of 8 bits.

    Args:
        path: an image file in one of the formats of `picture_files.py`, or its content.
        name: what messages call it; by default the path.

    Returns:
        The picture, mode "RGB".

    Raises:
        ValueError: the file is missing, damaged or no such image, or has too many pixels; the message is one line that
            names the file and says what to do.
    """
    with opened_picture(path, name) as image:
        pixels = upright_pixels(image, 3)  # (channels, height, width)
    return rgb_image(pixels)


def rgb_image(pixels: np.ndarray) -> Image.Image:
    """The picture of `(3, height, width)` values from 0 to 255; floats are rounded."""
    if pixels.dtype != np.uint8:
        pixels = pixels.round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)))


def check_picture_name(path: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: the name does not end as one of `PICTURE_FORMATS`; the message lists them.
    """
    if Path(path).suffix.lower() not in PICTURE_FORMATS:
        raise ValueError(f"cannot tell the picture format of {path}; end its name in {', '.join(PICTURE_FORMATS)}")


def save_image(image: Image.Image, path: str | os.PathLike) -> None:
    """Write a picture, whole or not at all, in the format that the name's ending says.

    Raises:
        ValueError: the ending is unknown, or the picture cannot be written.
    """
    check_picture_name(path)
    file_format = PICTURE_FORMATS[Path(path).suffix.lower()]
    write_whole(path, lambda file: image.save(file, format=file_format))
