"""Photographs in, pictures out: any common image as 8-bit RGB."""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from proscale_hf.files.text import one_line
from proscale_hf.files.whole import write_whole
from proscale_hf.processing.pixels import read_pixels


PICTURE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}


def load_image(path: str | os.PathLike) -> Image.Image:
    """Reads an image file as an upright 8-bit RGB picture.

    The EXIF orientation is applied, transparency is laid over white, 16-bit values are brought to 8 bits,
    and of an animation the first frame is taken.

    Args:
        path: an image file in any format Pillow reads.

    Returns:
        The picture, mode "RGB".

    Raises:
        ValueError: there is no such file, or it is not an image, is damaged, or has too many pixels; the message
            is one line that says what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give one image file")
    if not path.is_file():
        raise ValueError(f"there is no file {path}; check the path")
    try:
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty (0 bytes); copy or download it again")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # e.g. odd metadata; what matters is whether the pixels can be read
            with Image.open(path) as image:
                image.load()
                pixels = read_pixels(image, 3, None, name=str(path))  # (channels, height, width)
                return Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)))
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that Pillow can read; give a PNG, JPEG, WebP or TIFF file") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 1_000_000
        raise ValueError(f"{path} has more than {limit} million pixels; make it smaller first") from None
    except PermissionError:
        raise ValueError(f"{path} may not be read; check its permissions") from None
    except (OSError, SyntaxError, EOFError, IndexError, OverflowError, ArithmeticError) as error:
        # What Pillow's decoders raise on damaged data depends on the format.
        raise ValueError(f"{path} is damaged ({one_line(error)}); copy or download it again") from error


def check_picture_name(path: str | os.PathLike) -> None:
    """Raises a ValueError that lists the known endings when `path` does not end in one of `PICTURE_FORMATS`."""
    if Path(path).suffix.lower() not in PICTURE_FORMATS:
        raise ValueError(f"cannot tell the picture format of {path}; end its name in {', '.join(PICTURE_FORMATS)}")


def save_image(image: Image.Image, path: str | os.PathLike) -> None:
    """Writes a picture in the format its name ends in, whole or not at all.

    Raises:
        ValueError: the name's ending is unknown, or the picture cannot be written.
    """
    check_picture_name(path)
    file_format = PICTURE_FORMATS[Path(path).suffix.lower()]
    write_whole(path, lambda file: image.save(file, format=file_format))
