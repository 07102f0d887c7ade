"""Random damage to images, COCO JSON and run-length codes: each ends well, or in one line that names the file.

`PROSCALE_FUZZ_SEED` chooses other damage, `PROSCALE_FUZZ_ROUNDS` how much of it.
"""

import copy
import io
import json
import os
import random
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image, features


datasets = pytest.importorskip("datasets")
coco_mask = pytest.importorskip("pycocotools.mask")

from proscale_hf.data.reading import open_map
from proscale_hf.data.sample import SampleError
from proscale_hf.data.sources.coco import CocoInstance, CocoPanoptic
from proscale_hf.data.sources.shapes import run_length_code
from proscale_hf.processing.pictures import load_image
from proscale_hf.processing.run_length import encode_mask
from proscale_hf.processing.segment_ids import encode_ids


pytestmark = pytest.mark.slow
SEED = int(os.environ.get("PROSCALE_FUZZ_SEED", "0"))
ROUNDS = float(os.environ.get("PROSCALE_FUZZ_ROUNDS", "1"))
LONGEST_LINE = 1000  # characters, beside the paths
SIZE = HEIGHT, WIDTH = 12, 16


def rounds(number: int) -> Iterator[random.Random]:
    for index in range(int(number * ROUNDS)):
        yield random.Random(f"{SEED} {number} {index}")


def ends_well(action: Callable[[], object], *names: str) -> bool:
    """Whether it succeeds; if not, it must say why in one short line with one of the names."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action()
        return True
    except ValueError as error:
        text = str(error)
        assert "\n" not in text and len(text) < LONGEST_LINE and any(name in text for name in names), text
        return False


def spoiled(content: bytes, dice: random.Random) -> bytes:
    """Bytes with some of them changed, missing, repeated, or replaced by numbers that are large."""
    content = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 5, 20))):
        if not content:
            break
        place = dice.randrange(min(len(content), dice.choice((40, 200, len(content)))))  # heads above all
        kind = dice.randrange(6)
        if kind == 0:
            content[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            content[place] = dice.randrange(256)
        elif kind == 2:
            del content[place:]
        elif kind == 3:
            del content[place : place + dice.randrange(1, 9)]
        elif kind == 4:
            content[place:place] = content[place : place + dice.randrange(1, 99)]
        else:
            number = dice.choice((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1))
            content[place : place + 4] = number.to_bytes(4, dice.choice(("big", "little")))
    return bytes(content)


def image_files() -> dict[str, bytes]:
    generator = np.random.default_rng(0)
    colors = Image.fromarray(generator.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    deep = Image.fromarray(generator.integers(0, 65536, SIZE, dtype=np.uint16))
    kinds = {
        "PNG": [colors, colors.convert("RGBA"), colors.convert("P"), deep],
        "TIFF": [colors, deep, deep.convert("F"), colors.convert("CMYK")],
        "JPEG": [colors, colors.convert("L")],
        "PPM": [colors, colors.convert("L"), deep],
        "GIF": [colors],
        "BMP": [colors, colors.convert("P")],
        "WEBP": [colors],
        "JPEG2000": [colors],
        "AVIF": [colors] if features.check("avif") else [],
    }
    files = {}
    for file_format, pictures in kinds.items():
        for picture in pictures:
            file = io.BytesIO()
            exif = Image.Exif()
            exif[0x0112] = 6
            with_exif = {"exif": exif} if file_format in ("PNG", "JPEG", "WEBP") else {}
            picture.save(file, format=file_format, **with_exif)
            files[f"{file_format} {picture.mode}"] = file.getvalue()
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        file = io.BytesIO()
        colors.save(file, format="TIFF", compression=compression)
        files[f"TIFF {compression}"] = file.getvalue()
    return files


def test_image_files(tmp_path):
    files = image_files()
    path = tmp_path / "spoiled.png"
    successes = failures = 0
    for dice in rounds(3000):
        path.write_bytes(spoiled(files[dice.choice(sorted(files))], dice))
        for read in (load_image, open_map):
            if ends_well(lambda read=read: read(path), path.name):
                successes += 1
            else:
                failures += 1
    assert successes and failures


HOSTILE = (
    None,
    True,
    0,
    -1,
    1,
    255,
    2**31,
    2**63,
    10**400,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "0",
    "1",
    "\n",
    "\x00",
    "\ud800",
    "../../secret",
    "x" * 5000,
    [],
    {},
    [[]],
    [[1, 2]],
    [[[1, 2], [3, 4], [5, 6]]],
    [{"x": 1, "y": 2}],
    {"size": [12, 16], "counts": [192]},
    {"size": [12, 16], "counts": "o" * 99},
    {"size": [10**9, 10**9], "counts": [0, 10**18]},
    list(range(200)),
    [[0, 0, 10**9, 0, 10**9, 10**9]],
)


def places(value: object) -> Iterator[tuple[object, object]]:
    """Each container with each of its keys, of a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def mutated(value: dict, dice: random.Random) -> dict:
    """A JSON value with some of its parts replaced, missing, doubled or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        found = list(places(value))
        if not found:
            break
        container, key = dice.choice(found)
        kind = dice.randrange(6)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif kind == 2:
            other, other_key = dice.choice(found)
            container[key] = copy.deepcopy(other[other_key])
        else:
            container[key] = copy.deepcopy(dice.choice(HOSTILE))
    return value


def write_json(path, value: dict, dice: random.Random) -> None:
    content = json.dumps(value).encode()
    path.write_bytes(spoiled(content, dice) if dice.random() < 0.2 else content)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("proscale_hf.data.sources.coco.cached_rows", lambda make_rows, *_: list(make_rows()))


def read_all(source) -> None:
    for row in list(source.rows()):
        json.dumps(row)
        source.read(row).packed_masks()


def test_instance_json(tmp_path, own_cache):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "0.png")
    mask = np.zeros(SIZE, bool)
    mask[2:7, 3:9] = True
    shapes = [
        [[1, 1, 9.5, 1, 9, 9]],
        [[[1, 1], [9, 1], [9, 9]], [2, 2, 5, 2, 5, 5]],
        encode_mask(mask),
        {"size": [HEIGHT, WIDTH], "counts": [20, 30, HEIGHT * WIDTH - 50]},
    ]
    content = {
        "images": [{"id": 1, "file_name": "0.png", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {
                "id": i,
                "image_id": 1,
                "category_id": 1,
                "iscrowd": i % 2,
                "area": 9,
                "bbox": [1, 1, 2, 2],
                "segmentation": s,
            }
            for i, s in enumerate(shapes)
        ],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    read_all(CocoInstance(images=tmp_path, annotations=path))
    ends = []
    for dice in rounds(1500):
        write_json(path, mutated(content, dice), dice)
        ends.append(ends_well(lambda: read_all(CocoInstance(images=tmp_path, annotations=path)), str(tmp_path)))
    assert True in ends and False in ends


def test_panoptic_json(tmp_path, own_cache):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "0.jpg")
    ids = np.zeros(SIZE, np.int64)
    ids[:4], ids[4:8], ids[8:, 3:] = 7, 70_000, 300
    Image.fromarray(encode_ids(ids)).save(tmp_path / "0.png")
    segments = [{"id": i, "category_id": 1 + i % 2, "iscrowd": i % 3 == 0} for i in (7, 300, 70_000)]
    content = {
        "images": [{"id": 1, "file_name": "0.jpg", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}],
        "annotations": [{"image_id": 1, "file_name": "0.png", "segments_info": segments}],
    }
    path = tmp_path / "a.json"
    options = {"images": tmp_path, "annotations": path, "segment_maps": tmp_path}
    path.write_text(json.dumps(content))
    read_all(CocoPanoptic(**options))
    ends = []
    for dice in rounds(800):
        write_json(path, mutated(content, dice), dice)
        ends.append(ends_well(lambda: read_all(CocoPanoptic(**options)), str(tmp_path)))
    assert True in ends and False in ends


def test_run_length_codes():
    generator = np.random.default_rng(0)
    codes = [encode_mask(generator.random(SIZE) < share)["counts"] for share in (0, 0.1, 0.5, 1)]
    ends = []
    for dice in rounds(15_000):
        counts = spoiled(dice.choice(codes).encode(), dice).decode("latin-1")
        if dice.random() < 0.3:
            counts = "".join(chr(dice.randrange(40, 120)) for _ in range(dice.randrange(20)))

        def decode(counts=counts):
            code, area = run_length_code({"size": list(SIZE), "counts": counts}, SIZE, "it")
            mask = coco_mask.decode(code)
            if mask.max() > 1 or mask.sum() != area:
                raise AssertionError(counts)

        try:
            decode()
            ends.append(True)
        except SampleError as error:
            assert "\n" not in str(error)
            ends.append(False)
    assert True in ends and False in ends
