"""Values of black and white: pictures of the same values come out alike from every container, and guesses are said."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from proscale_hf.processing.pictures import load_image
from proscale_hf.processing.pixels import read_pixels
from proscale_hf.processing.value_range import say_once, to_eight_bits


@pytest.fixture(autouse=True)
def nothing_said_yet():
    say_once.cache_clear()


def noise(*shape):
    values = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    values.flat[:2] = 0, 255
    return values


GREY, COLORS = noise(9, 11), noise(9, 11, 3)
# How the values of 8 bits are written with others: each of them has a guess, or None.
DEPTHS = {
    "8 in 16": (np.uint16, 255, "255 is taken"),
    "12 in 16": (np.uint16, 4095, "4095 is taken"),
    "16": (np.uint16, 65535, None),
    "16, signed": (np.int16, 32767, None),
    "8 in 32": (np.int32, 255, None),
    "12 in 32": (np.int32, 4095, "4095 is taken"),
    "16 in 32": (np.int32, 65535, "65535 is taken"),
    "32": (np.uint32, 2**32 - 1, None),
    "32, signed": (np.int32, 2**31 - 1, None),
    "8 in 64": (np.int64, 255, None),
    "float, to 1": (np.float32, 1, "1 is taken"),
    "half, to 1": (np.float16, 1, "1 is taken"),
    "double, to 255": (np.float64, 255, None),
    "float, to 4095": (np.float32, 4095, "4095 is taken"),
    "float, to 65535": (np.float32, 65535, "65535 is taken"),
}


def deep(values, depth):
    dtype, white, _ = DEPTHS[depth]
    scaled = values * (white / 255)
    return (scaled if np.issubdtype(dtype, np.floating) else scaled.round()).astype(dtype)


def read(image, **options):
    """(height, width, channels) values, and what was said about them."""
    say_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pixels = read_pixels(image, 3, None, "it", **options)
    return np.moveaxis(pixels, 0, -1), [str(entry.message) for entry in caught]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("values", [GREY, COLORS, np.full((4, 5), 77, np.uint8)], ids=["grey", "colors", "plain"])
def test_arrays_and_tensors(depth, values):
    if values.max() == 77 and DEPTHS[depth][1] == 65535:
        values = values[:2]
    array = deep(values, depth)
    expected = values if values.ndim == 3 else values[..., None]
    images = [array]
    if array.dtype != np.uint32:
        images.append(torch.from_numpy(array) if values.ndim == 2 else torch.from_numpy(array).permute(2, 0, 1))
    for image in images:
        pixels, said = read(image)
        assert np.abs(pixels - expected.astype(np.float32)).max() < 0.6
        guess = DEPTHS[depth][2]
        assert [guess in text for text in said] == ([] if guess is None else [True])


@pytest.mark.parametrize("depth", ["8 in 16", "12 in 16", "16", "8 in 32", "12 in 32", "16 in 32", "32, signed"])
@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_grey_files_and_pil_images(tmp_path, depth, ending):
    picture = Image.fromarray(deep(GREY, depth))
    path = tmp_path / f"a.{ending}"
    if picture.mode == "I" and (ending == "png" or (DEPTHS[depth][1] > 65535 and ending != "tif")):
        pytest.skip("this format has no such values")
    if ending == "pgm":  # older Pillows read 16 bits, but do not write them
        path.write_bytes(b"P5 %d %d 65535\n" % picture.size + np.asarray(picture).astype(">u2").tobytes())
    else:
        picture.save(path)
    for image in (picture, path, Image.open(path)):
        assert np.abs(read(image)[0].astype(int) - GREY[..., None]).max() <= 1
    assert np.abs(np.asarray(load_image(path)).astype(int) - GREY[..., None]).max() <= 1


@pytest.mark.parametrize("depth", ["float, to 1", "float, to 4095"])
def test_float_files(tmp_path, depth):
    Image.fromarray(deep(GREY, depth)).save(tmp_path / "a.tif")
    assert np.abs(read(tmp_path / "a.tif")[0] - GREY[..., None]).max() < 0.01
    assert (np.asarray(load_image(tmp_path / "a.tif")) == GREY[..., None]).all()


def test_unsigned_files_of_32_bits(tmp_path):
    write_tiff(tmp_path / "a.tif", deep(GREY, "32")[..., None])
    assert (read(tmp_path / "a.tif")[0] == GREY[..., None]).all()


@pytest.mark.parametrize("depth", ["8 in 16", "12 in 16", "16"])
@pytest.mark.parametrize("write", ["png", "tiff", "tiff, big-endian", "tiff, deflated"])
@pytest.mark.parametrize("has_opacity", [False, True])
def test_colour_files_of_16_bits(tmp_path, depth, write, has_opacity):
    values = deep(COLORS, depth)
    if has_opacity:
        values = np.concatenate([values, np.full((9, 11, 1), 65535, np.uint16)], axis=-1)
    path = tmp_path / "a"
    if write == "png":
        write_png(path, values)
    else:
        extra = 2 if has_opacity else None
        write_tiff(path, values, extra, order=">" if "big" in write else "<", deflated="deflated" in write)
    assert np.abs(read(path)[0].astype(int) - COLORS).max() <= 1


def test_the_caller_knows_better():
    as_float, as_deep = COLORS / 255, deep(COLORS, "12 in 16")
    assert np.abs(read(as_float, rescale_factor=None)[0] - as_float).max() < 1e-6
    assert (read(as_deep, rescale_factor=1 / 65535)[0] == as_deep).all()
    assert (read(as_float, rescale_factor=1.0)[0] == as_float.astype(np.float32)).all()
    assert (read(deep(COLORS, "16"), rescale_factor=None)[0] == COLORS).all()  # floats alone stay
    for options in ({"rescale_factor": 1 / 65535}, {"rescale_factor": None}, {"rescale_factor": 1 / 256}):
        pixels, said = read(COLORS, **options)
        assert (pixels == COLORS).all() and not said


def test_overshoot_of_floats_is_no_other_range():
    values = np.array([[-0.1, 0.5, 1.2]])
    assert to_eight_bits(values).tolist() == pytest.approx(values * 255)
    assert to_eight_bits(np.array([-9.0, 300.0])).tolist() == [-9, 300]


@pytest.mark.parametrize(
    "values",
    [
        np.array([-2.0, 0.0, 2.0]),
        np.array([-1000, 0, 1000], np.int16),
        np.array([-(2**31), 0, 2**31 - 1], np.int32),
        np.array([0, 2**40, 2**41]),
        np.array([0, 100_000, 200_000], np.uint32),
        np.array([0.0, 1e30, 2e30]),
    ],
)
def test_values_of_no_usual_range_are_stretched(values):
    with pytest.warns(UserWarning, match="the least is taken for black"):
        assert np.abs(to_eight_bits(values) - [0, 127.5, 255]).max() <= 0.6


def test_values_that_are_not_numbers():
    with pytest.warns(UserWarning, match="NaN or infinite"):
        assert to_eight_bits(np.array([np.nan, np.inf, -np.inf, 200.0])).tolist() == [0, 0, 0, 200]
    for values in (np.array([1j]), np.array(["a"]), np.array([None])):
        with pytest.raises(ValueError, match="not numbers"):
            to_eight_bits(values)


def test_a_guess_is_said_once():
    with pytest.warns(UserWarning) as caught:
        for _ in range(3):
            to_eight_bits(np.array([0.5]))
    assert len(caught) == 1


def test_black_pictures_are_no_guess():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (np.uint16, np.float32, np.int64, bool):
            assert not to_eight_bits(np.zeros((2, 3), dtype)).any()


BANDS = np.concatenate([COLORS, np.zeros((9, 11, 1), np.uint8)], axis=-1)


@pytest.mark.parametrize("depth", ["16", "float, to 1", "double, to 255"])
def test_the_fourth_channel_of_an_array_is_left_out(depth):
    for image in (BANDS, torch.from_numpy(BANDS).permute(2, 0, 1), deep(BANDS, depth)):
        pixels, said = read(image)
        assert np.abs(pixels - COLORS).max() < 0.01
        assert "fourth channel" in said[0]


@pytest.mark.parametrize(("extra", "is_opacity"), [(None, False), (0, False), (1, True), (2, True), (999, False)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_fourth_channel_of_a_tiff_is_opacity_if_the_file_says_so(tmp_path, extra, is_opacity, dtype):
    if extra == 999 and dtype == np.uint16:
        pytest.skip("Pillow cannot read it")
    write_tiff(tmp_path / "a.tif", BANDS if dtype == np.uint8 else deep(BANDS, "16"), extra)
    expected = np.full_like(COLORS, 255) if is_opacity else COLORS
    for image in (tmp_path / "a.tif", Image.open(tmp_path / "a.tif")):
        assert np.abs(read(image)[0].astype(int) - expected).max() <= 1


def test_opacity_of_pil_images():
    clear = Image.fromarray(BANDS)
    png = io.BytesIO()
    clear.save(png, format="PNG")
    tiff = io.BytesIO()
    clear.save(tiff, format="TIFF")  # Pillow writes that it is opacity
    for image in (clear, clear.convert("LA"), Image.open(png), Image.open(tiff)):
        pixels, said = read(image)
        assert pixels.min() == 255 and not said


def write_png(path, values):
    height, width, channels = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def write_tiff(path, values, extra=None, order="<", deflated=False):
    """A TIFF file of one strip; `extra` says what the last channel is."""
    height, width, channels = values.shape
    bits = 8 * values.dtype.itemsize
    content = values.astype(values.dtype.newbyteorder(order)).tobytes()
    content = zlib.compress(content) if deflated else content
    entries = {  # type (3: 16 bits, 4: 32 bits) and values of each tag
        256: (4, width),
        257: (4, height),
        258: (3, *[bits] * channels),
        259: (3, 8 if deflated else 1),
        262: (3, 2 if channels > 1 else 1),
        273: (4, 0),
        277: (3, channels),
        278: (4, height),
        279: (4, len(content)),
    }
    if extra is not None:
        entries[338] = (3, extra)
    bits_at = 8 + 2 + 12 * len(entries) + 4
    entries[273] = (4, bits_at + 8)
    directory = b""
    for tag, (kind, *numbers) in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            packed, wide = struct.pack(f"{order}I", bits_at), packed.ljust(8, b"\0")
        directory += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    if channels < 3:
        wide = b"\0" * 8
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    path.write_bytes(head + directory + b"\0" * 4 + wide + content)
