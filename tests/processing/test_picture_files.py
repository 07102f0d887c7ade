"""Image files of others: known formats alone, no other programs, and one line that names the file."""

import base64
import http.server
import io
import os
import threading

import numpy as np
import pytest
from PIL import Image, features

from proscale_hf.files.reading import FileError
from proscale_hf.processing import picture_files
from proscale_hf.processing.picture_files import FORMATS, fetched, opened_picture
from proscale_hf.processing.pictures import load_image
from proscale_hf.processing.pixels import read_pixels


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))


def content(file_format, picture=PICTURE, **options):
    file = io.BytesIO()
    picture.save(file, format=file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("file_format", [known for known in FORMATS if known not in ("HEIF", "MPO")])
def test_known_formats(tmp_path, file_format):
    if file_format == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow has no AVIF")
    (tmp_path / "a").write_bytes(content(file_format))
    for source, name in ((tmp_path / "a", None), (content(file_format), "it")):
        with opened_picture(source, name) as picture:
            assert picture.size == PICTURE.size
    assert load_image(tmp_path / "a").mode == "RGB"


@pytest.mark.parametrize("name", ["a.eps", "a.png", "a"])
def test_no_other_program_is_started(tmp_path, monkeypatch, name):
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    (tmp_path / name).write_bytes(content("EPS"))
    for read in (load_image, lambda path: read_pixels(path, 3, None, "image 0")):
        with pytest.raises(ValueError, match=rf"{name} cannot be read: it is not an image of a known format"):
            read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\x05IHDR\0\0\0\0\0\0\0\0\0", "cannot be read"),
        (b"qoif\0\0\0\x09\0\0\0\x09\x03\0", "not an image of a known format"),
        (b"BM" + b"\xff" * 60, "cannot be read"),
        (b"P5 99999 99999 255\n", "million pixels"),
        (b"P6 10 10 255\nabc", "cannot be read"),
        (content("TIFF")[:-200], "cannot be read"),
        (content("JPEG2000")[:100], "cannot be read"),
    ],
)
def test_broken_files_are_named(tmp_path, broken, message):
    path = tmp_path / "broken.png"
    path.write_bytes(broken)
    for read in (load_image, lambda path: read_pixels(path, 3, None, "image 0")):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert "broken.png" in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path, tmp_path / "none.png", "a" * 5000, "a\0b"):
        for read in (load_image, lambda path: read_pixels(path, 3, None, "image 0")):
            with pytest.raises(ValueError, match=r"not a file|no file|cannot be") as error:
                read(path)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("raised", [SyntaxError("a\nb"), MemoryError(), KeyError("a"), Image.DecompressionBombError()])
def test_whatever_pillow_raises_names_the_file(tmp_path, monkeypatch, raised):
    def fail(*_, **__):
        raise raised

    (tmp_path / "a.png").write_bytes(content("PNG"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(FileError, match=r"a\.png") as error:
        load_image(tmp_path / "a.png")
    assert "\n" not in str(error.value)


def test_colours_of_16_bits_are_no_ids(tmp_path):
    tiff = content("TIFF", Image.fromarray(np.zeros((2, 3), np.uint16)))
    with opened_picture(tiff, "it", holds_ids=True) as picture:
        assert picture.mode == "I;16"


def test_texts_in_base64(tmp_path, monkeypatch):
    code = base64.encodebytes(content("PNG")).decode()
    for text in (code, code.replace("\n", ""), f"data:image/png;base64,{code}"):
        assert np.array_equal(np.moveaxis(read_pixels(text, 3, None, "it"), 0, -1), np.asarray(PICTURE))
    monkeypatch.chdir(tmp_path)
    name = "a" * 64  # could be base64, but is a file
    (tmp_path / name).write_bytes(content("PNG"))
    assert fetched(name) == name


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        self.wfile.write(content("EPS" if self.path == "/eps" else "PNG"))

    def log_message(self, *_):
        pass


def test_addresses(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(np.moveaxis(read_pixels(f"{place}/a", 3, None, "it"), 0, -1), np.asarray(PICTURE))
        for path, message in (("eps", "not an image of a known format"), ("none", "404")):
            with pytest.raises(ValueError, match=f"it cannot be read: .*{message}"):
                read_pixels(f"{place}/{path}", 3, None, "it")
        monkeypatch.setattr(picture_files, "LARGEST_DOWNLOAD", 10)
        with pytest.raises(ValueError, match="more than 10 bytes"):
            read_pixels(f"{place}/a", 3, None, "it")
        server.shutdown()
