"""Image files: photographs are read as 8-bit RGB, and pictures are written."""

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
    """Read an image file as an upright 8-bit RGB picture.

    The EXIF orientation is applied, transparency is laid over white, 16-bit values are brought to 8 bits,
    and an animation gives its first frame.

    Args:
        path: an image file in any format that Pillow reads.

    Returns:
        The picture, mode "RGB".

    Raises:
        ValueError: the file is missing, damaged or no image, or has too many pixels; the message is one line that
            says what to do.
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
            warnings.simplefilter("ignore")  # about odd metadata, say; only unreadable pixels matter
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
        # Each of Pillow's decoders raises other types on damaged data.
        raise ValueError(f"{path} is damaged ({one_line(error)}); copy or download it again") from error


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
