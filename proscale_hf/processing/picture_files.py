"""Image files of others: only formats of a list are opened, and every fault is one line that names the file.

Pillow knows more formats than these. Some of them start other programs, such as EPS; some can be mistaken for anything.
"""

import base64
import binascii
import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator

import numpy as np

from proscale_hf.files.reading import FileError, open_file, reading
from proscale_hf.files.text import one_line
from proscale_hf.processing.value_range import to_eight_bits


try:
    from PIL import Image, UnidentifiedImageError
except ImportError:  # then there are no image files, only arrays and tensors
    Image = None

try:
    from huggingface_hub.utils import httpx
except ImportError:
    try:
        import httpx
    except ImportError:
        httpx = None


# HEIF is there if a plugin for Pillow has been registered.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "MPO", "JPEG2000", "AVIF", "HEIF")
DEEP_COLORS = [f"{colors};16{order}" for colors in ("RGB", "RGBX", "RGBA") for order in "BLN"]  # Pillow's raw modes
LARGEST_DOWNLOAD = 2**29  # bytes
SHORTEST_BASE64 = 64  # characters; shorter texts can be no image
LARGEST_UPPER_BYTE = 15  # of a value of 12 bits in 16


@contextlib.contextmanager
def opened_picture(
    source: str | os.PathLike | bytes, name: str | None = None, holds_ids: bool = False
) -> Iterator["Image.Image"]:
    """The first frame of an image file, with its pixels read.

    Args:
        source: a regular file, or its content.
        name: what messages call it; by default the path. Content needs one.
        holds_ids: its colours are numbers, which must stay as they are.

    Raises:
        FileError: there is no such file, it is of another format than `FORMATS`, damaged or too large, or something
            inside the context is raised over its pixels.
    """
    name = os.fspath(source) if name is None else name
    with reading(name, reason=lambda error: f"it is damaged ({one_line(error)[:100]}); copy or download it again"):
        file = io.BytesIO(source) if isinstance(source, bytes) else open_file(source)
        with file:
            yield _loaded(file, name, holds_ids)


def fetched(source: str | os.PathLike) -> str | os.PathLike | bytes:
    """What `opened_picture` takes, of a path, an address on the web, or a text in base64.

    Raises:
        Exception: the address cannot be read; what it is depends on the client.
    """
    if not isinstance(source, str):
        return source
    if source.startswith(("http://", "https://")):
        return _downloaded(source)
    if source.startswith("data:image/"):
        return base64.b64decode(source.partition(",")[2])
    if len(source) >= SHORTEST_BASE64 and not os.path.lexists(source):
        with contextlib.suppress(binascii.Error, ValueError):
            return base64.b64decode("".join(source.split()), validate=True)
    return source


def _downloaded(address: str) -> bytes:
    content = bytearray()
    with httpx.stream("GET", address, timeout=None, follow_redirects=True) as response:
        response.raise_for_status()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > LARGEST_DOWNLOAD:
                raise FileError(f"{address} has more than {LARGEST_DOWNLOAD:,} bytes; download a smaller image")
    return bytes(content)


def _loaded(file: io.BufferedIOBase, name: str, holds_ids: bool) -> "Image.Image":
    if not file.read(1):
        raise FileError(f"{name} is empty (0 bytes); copy or download it again")
    image = _opened(file, name)
    raw_mode = _raw_mode(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata, say; only unreadable pixels matter
        image.load()
    if raw_mode in DEEP_COLORS:
        if holds_ids:
            raise FileError(f"{name} has colours of 16 bits, but ids have 8 bits in each; save it again with those")
        _restore_low_bytes(image, raw_mode, _opened(file, name))
    return image


def _opened(file: io.BufferedIOBase, name: str) -> "Image.Image":
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(file, formats=[known for known in FORMATS if known in Image.OPEN])
    except UnidentifiedImageError:
        reason = "it is not an image of a known format; give PNG, JPEG, WebP or TIFF"
        raise FileError(f"{name} cannot be read: {reason}") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 1_000_000
        raise FileError(f"{name} has more than {limit} million pixels; make it smaller first") from None


def _raw_mode(image: "Image.Image") -> str:
    """How the pixels lie in the file, by Pillow's names; empty where it does not say."""
    arguments = image.tile[0][3] if image.tile else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _restore_low_bytes(image: "Image.Image", raw_mode: str, again: "Image.Image") -> None:
    """Of colours of 16 bits Pillow keeps the upper 8, which say next to nothing if only the lower 12 are used.

    Args:
        image: as Pillow has read it; its colours are replaced if they need to be.
        raw_mode: of the file.
        again: the same file, opened once more. Read in the other order of bytes, its lower bytes come out as the upper.
    """
    pixels = np.array(image)  # (height, width, channels)
    upper = pixels[..., :3]
    if upper.max() > LARGEST_UPPER_BYTE:
        return
    swapped = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    other_mode = re.sub(";16(.)", lambda match: f";16{swapped[match[1]]}", raw_mode)
    again.tile = [_with_raw_mode(tile, other_mode) for tile in again.tile]
    again.load()
    values = upper.astype(np.uint16) * 256 + np.array(again)[..., :3]
    pixels[..., :3] = to_eight_bits(values)
    image.frombytes(pixels.tobytes())


def _with_raw_mode(tile: tuple, raw_mode: str) -> tuple:
    arguments = (raw_mode, *tile[3][1:]) if isinstance(tile[3], tuple) else raw_mode
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)
