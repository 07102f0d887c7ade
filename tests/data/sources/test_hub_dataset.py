"""Data sets in the format of `datasets`: on disk and from a Hub, in all three forms."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hub_server import HubServer


datasets = pytest.importorskip("datasets")
coco_mask = pytest.importorskip("pycocotools.mask")

from paths import ROOT
from proscale_hf.data.opening import open_dataset
from proscale_hf.data.sample import SampleError


CATEGORIES = [{"id": 4, "name": "cat", "isthing": 1}, {"id": 7, "name": "grass", "isthing": 0}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def categories(tmp_path):
    path = tmp_path / "categories.json"
    path.write_text(json.dumps(CATEGORIES))
    return path


def table(annotations, **columns):
    annotations = [Image.fromarray(np.asarray(annotation, np.uint8)) for annotation in annotations]
    images = [Image.new("RGB", annotation.size, "green") for annotation in annotations]
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    made = datasets.Dataset.from_dict({"image": images, "annotation": annotations}, features=features)
    for name, values in columns.items():
        made = made.add_column(name, values)
    return made


def test_semantic(tmp_path, categories):
    table([[[4, 4, 7]], [[7, 0, 255]]]).save_to_disk(tmp_path / "data")
    dataset = open_dataset("hub", path=tmp_path / "data", split="train", categories=categories)
    assert [sample.image_id for sample in dataset] == [0, 1]
    assert [sample.segment_map.tolist() for sample in dataset] == [[[1, 1, 2]], [[1, 0, 0]]]
    assert [segment["label_id"] for segment in dataset[1].segments] == [1]
    assert dataset[0].image.mode == "RGB" and dataset[0].file_name.endswith("data, row 0")


def test_reduced_labels(tmp_path, categories):
    table([[[5, 5, 8, 0]]]).save_to_disk(tmp_path / "data")
    sample = open_dataset("hub", path=tmp_path / "data", split="train", categories=categories, reduce_labels=True)[0]
    assert sample.segment_map.tolist() == [[1, 1, 2, 0]]
    assert [segment["label_id"] for segment in sample.segments] == [0, 1]


def test_instances_as_in_the_example_scripts(tmp_path, categories):
    picture = np.zeros((3, 4, 3), np.uint8)  # red: category, green: object
    picture[0], picture[1, :2], picture[2] = (4, 1, 0), (4, 9, 0), (7, 0, 0)
    table([picture]).save_to_disk(tmp_path / "data")
    sample = open_dataset("hub", path=tmp_path / "data", split="train", categories=categories, form="instance")[0]
    assert [segment["label_id"] for segment in sample.segments] == [0, 0]
    assert [coco_mask.decode(mask).tolist() for mask in sample.masks] == [
        [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]],
    ]
    assert [segment["area"] for segment in sample.segments] == [4, 2]
    options = {"split": "train", "categories": categories, "form": "instance", "reduce_labels": True}
    table([picture + np.array([1, 0, 0], np.uint8)]).save_to_disk(tmp_path / "reduced")
    reduced = open_dataset("hub", path=tmp_path / "reduced", **options)[0]
    assert (reduced.segments, reduced.masks) == (sample.segments, sample.masks)
    picture[1, 3] = (6, 3, 0)
    table([picture]).save_to_disk(tmp_path / "other")
    with pytest.raises(SampleError, match=r"ids \[6\] are not among the 2 categories"):
        open_dataset("hub", path=tmp_path / "other", split="train", categories=categories, form="instance")[0]


def test_panoptic(tmp_path, categories):
    picture = np.zeros((1, 4, 3), np.uint8)
    picture[0, 0], picture[0, 1], picture[0, 2] = (3, 0, 1), (0, 2, 0), (1, 0, 0)
    segments = [
        {"id": 65539, "category_id": 7, "iscrowd": 0},
        {"id": 512, "category_id": 4, "iscrowd": 0},
        {"id": 1, "category_id": 4, "iscrowd": 1},
        {"id": 2, "category_id": 4, "iscrowd": 0},  # without a pixel
    ]
    table([picture], segments_info=[segments], name=["first"]).save_to_disk(tmp_path / "data")
    options = {"path": tmp_path / "data", "split": "train", "categories": categories, "form": "panoptic"}
    sample = open_dataset("hub", **options, id_column="name")[0]
    assert sample.image_id == "first" and sample.segment_map.tolist() == [[65539, 512, 1, 0]]
    assert [(s["label_id"], s["iscrowd"]) for s in sample.segments] == [(1, 0), (0, 0), (0, 1)]
    with pytest.raises(SampleError, match="must list segments"):
        open_dataset("hub", **options, segments_column="name")[0]


def test_names_of_classes_in_the_table(tmp_path, categories):
    names = ["sky", "tree", "road", "car", "cat", "b", "c", "grass"]
    segment = {"id": datasets.Value("int64"), "category_id": datasets.ClassLabel(names=names)}
    listed, in_columns = [{"id": 9, "category_id": 4}], {"id": [9], "category_id": [4]}
    for number, (feature, value) in enumerate(((datasets.Sequence(segment), in_columns), ([segment], listed))):
        made = table([np.full((1, 2, 3), [9, 0, 0])])
        features = datasets.Features({**made.features, "segments_info": feature})
        columns = {**made[:], "segments_info": [value]}
        path = tmp_path / f"data{number}"
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(path)
        options = {"path": path, "split": "train", "form": "panoptic"}
        assert open_dataset("hub", **options, categories=categories)[0].segments[0]["label_id"] == 0
        with pytest.raises(ValueError, match=r"id 4 'grass', but column segments_info of .* calls it 'cat'"):
            open_dataset("hub", **options, categories=[{"id": 4, "name": "grass", "isthing": 0}])


def test_pictures_are_opened_with_care(tmp_path, categories):
    good = datasets.Image().encode_example(Image.new("L", (3, 1), 4))
    eps, deep, turned = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (3, 1)).save(eps, format="EPS")
    Image.fromarray(np.full((1, 3), 4000, np.uint16)).save(deep, format="PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (1, 3), 4).save(turned, format="TIFF", exif=exif)
    images = [eps.getvalue(), deep.getvalue(), good["bytes"]]
    paths = [None, None, "of another machine.png"]
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    columns = {
        "image": [{"bytes": content, "path": path} for content, path in zip(images, paths, strict=True)],
        "annotation": [good, {"bytes": turned.getvalue(), "path": None}, good],
    }
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "data")
    dataset = open_dataset("hub", path=tmp_path / "data", split="train", categories=categories)
    with pytest.raises(SampleError, match=r"row 0, image cannot be read: it is not an image of a known format"):
        dataset[0]
    assert dataset[1].image.getpixel((0, 0)) == (249, 249, 249)  # of 4095
    assert dataset[1].segment_map.shape == (1, 3)
    assert dataset[2].image.size == (3, 1)


def test_a_picture_that_is_damaged(tmp_path, categories):
    image = datasets.Image()
    good = image.encode_example(Image.new("L", (3, 1), 4))
    bad = {"bytes": good["bytes"][:-30], "path": None}
    made = datasets.Dataset.from_dict(
        {"image": [good, bad], "annotation": [good, good]},
        features=datasets.Features({"image": image, "annotation": image}),
    )
    made.save_to_disk(tmp_path / "data")
    options = {"path": tmp_path / "data", "split": "train", "categories": categories}
    with pytest.raises(SampleError, match="data, row 1, image cannot be read"):
        open_dataset("hub", **options)[1]
    skipping = open_dataset("hub", **options, on_error="skip")
    assert skipping[1].image_id == 0 and len(skipping.skipped) == 1


def test_refused(tmp_path, categories):
    datasets.DatasetDict({"train": table([[[4]]], name=["a"])}).save_to_disk(tmp_path / "data")
    options = {"path": tmp_path / "data", "split": "train", "categories": categories}
    assert len(open_dataset("hub", **options)) == 1
    for changes, message in (
        ({"split": "val"}, r"split val, cannot be had: .*val"),
        ({"path": tmp_path / "nowhere"}, "nowhere, split train, cannot be had"),
        ({"annotation_column": "label"}, "no column label; it has image, annotation, name"),
        ({"annotation_column": "name"}, "Column name .* must hold images"),
        ({"form": "panoptic"}, "no column segments_info"),
        ({"form": "boxes"}, "form must be one of"),
        ({"void": "x"}, "void of hub must be"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_dataset("hub", **{**options, **changes})
        assert "\n" not in str(error.value)


CLIENT = """
import sys
from proscale_hf.data.opening import open_dataset

options = {"path": "alice/fields", "categories": sys.argv[1]}
dataset = open_dataset("hub", split="train[:2]", **options)
print([sample.segment_map.tolist() for sample in dataset])
try:
    open_dataset("hub", split="test", **options)
except ValueError as error:
    print(error)
try:
    open_dataset("hub", **{**options, "path": "alice/scripted"}, split="train")
except ValueError as error:
    print(error)
"""


def test_from_the_hub(tmp_path, categories):
    table([[[4, 4, 7]], [[7, 0, 255]], [[4, 4, 4]]]).to_parquet(tmp_path / "train.parquet")
    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        content = (tmp_path / "train.parquet").read_bytes()
        hub.create("alice/fields", type="dataset", files={"data/train-00000-of-00001.parquet": content})
        script = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
        hub.create("alice/scripted", type="dataset", files={"scripted.py": script})
        environment = hub.environment(tmp_path / "hub_cache", token="hf_alice", PYTHONPATH=str(ROOT))
        command = [sys.executable, "-c", CLIENT, str(categories)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    maps, split_error, script_error = result.stdout.splitlines()
    assert maps == "[[[1, 1, 2]], [[1, 0, 0]]]"
    assert "split test, cannot be had" in split_error
    assert "alice/scripted" in script_error and not (tmp_path / "ran").exists()
