"""Own pictures in a folder, with maps of categories or of instances."""

import json

import numpy as np
import pytest
from PIL import Image


datasets = pytest.importorskip("datasets")

from proscale_hf.data.opening import open_dataset
from proscale_hf.data.sample import SampleError


CATEGORIES = [{"id": 4, "name": "cat", "isthing": 1}, {"id": 70, "name": "grass", "isthing": 0}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def root(tmp_path):
    for folder in ("images", "annotations"):
        (tmp_path / "fields" / folder).mkdir(parents=True)
    (tmp_path / "fields" / "categories.json").write_text(json.dumps(CATEGORIES))
    return tmp_path / "fields"


def write(folder, name, values, suffix=".jpg"):
    values = np.asarray(values)
    Image.new("RGB", values.shape[1::-1], "green").save(folder / "images" / f"{name}{suffix}")
    Image.fromarray(values).save(folder / "annotations" / f"{name}.png")


def labels_of(sample):
    return {segment["id"]: segment["label_id"] for segment in sample.segments}


def test_maps_of_categories(root):
    write(root, "b", np.array([[70, 70, 0], [4, 255, 4]], np.uint8))
    write(root, "a", np.array([[70, 70]], np.uint8), ".PNG")
    dataset = open_dataset("folder", root=root)
    assert [sample.image_id for sample in dataset] == ["a", "b"]
    sample = dataset[1]
    assert sample.segment_map.tolist() == [[2, 2, 0], [1, 0, 1]] and labels_of(sample) == {1: 0, 2: 1}
    assert sample.image.size == (3, 2)


@pytest.mark.parametrize("coded", [False, True])
def test_maps_of_instances(root, coded):
    values = np.array([[4001, 4001, 4002], [70000, 0, 255]] if coded else [[4001, 4001, 4002], [4000, 0, 255]])
    if coded:
        picture = np.stack([values % 256, values // 256 % 256, values // 65536], axis=-1).astype(np.uint8)
    else:
        picture = values.astype(np.uint16)
    write(root, "a", picture)
    sample = open_dataset("folder", root=root, form="instance")[0]
    expected = [[1, 1, 2], [3, 0, 0]] if coded else [[2, 2, 3], [1, 0, 0]]
    assert sample.segment_map.tolist() == expected
    assert labels_of(sample) == ({1: 0, 2: 0, 3: 1} if coded else {1: 0, 2: 0, 3: 0})


def test_void_is_what_stands_for_no_category(root):
    write(root, "a", np.array([[0, 255, 7]], np.uint8))
    (root / "categories.json").write_text(json.dumps(["cat"]))
    with pytest.raises(ValueError, match="isthing"):
        open_dataset("folder", root=root)
    path = root / "own.json"
    path.write_text(json.dumps([{"id": 0, "name": "cat", "isthing": 1}, {"id": 7, "name": "dog", "isthing": 1}]))
    assert open_dataset("folder", root=root, categories=path)[0].segment_map.tolist() == [[1, 0, 2]]
    assert open_dataset("folder", root=root, categories=path, void=[7, 255])[0].segment_map.tolist() == [[1, 0, 0]]
    with pytest.raises(SampleError, match=r"a.png: values \[255\] stand for no category"):
        open_dataset("folder", root=root, categories=path, void=7)[0]


def test_splits(root):
    for split in ("train", "val"):
        for folder in ("images", "annotations"):
            (root / split / folder).mkdir(parents=True)
        write(root / split, split, np.array([[4]], np.uint8))
    assert open_dataset("folder", root=root, split="val")[0].image_id == "val"


def test_a_new_file_is_seen(root):
    write(root, "a", np.array([[4]], np.uint8))
    assert len(open_dataset("folder", root=root)) == 1
    write(root, "b", np.array([[4]], np.uint8))
    assert len(open_dataset("folder", root=root)) == 2


def test_refused(root):
    with pytest.raises(ValueError, match=r"list of images of .*images is empty"):
        open_dataset("folder", root=root)
    write(root, "a", np.array([[4, 5, 6]], np.uint8))
    with pytest.raises(SampleError, match=r"a.png: values \[5, 6\] stand for no category"):
        open_dataset("folder", root=root)[0]
    with pytest.raises(ValueError, match="form must be one of semantic, instance"):
        open_dataset("folder", root=root, form="panoptic")
    with pytest.raises(ValueError, match=r"void .*must be"):
        open_dataset("folder", root=root, void=True)
    with pytest.raises(ValueError, match=r"no file or folder .*val"):
        open_dataset("folder", root=root, split="val")
    Image.new("RGB", (3, 1)).save(root / "annotations" / "a.png")
    with pytest.raises(SampleError, match="one channel"):
        open_dataset("folder", root=root)[0]
    Image.new("RGB", (3, 1)).save(root / "images" / "c.jpg")
    with pytest.raises(ValueError, match=r"1 names have no file in .*annotations: \[c\]"):
        open_dataset("folder", root=root)
    Image.new("RGB", (3, 1)).save(root / "images" / "c.png")
    with pytest.raises(ValueError, match="have the same name"):
        open_dataset("folder", root=root)


def test_an_option_that_contradicts_the_folders_own_categories(root, tmp_path):
    write(root, "a", np.array([[70, 4]], np.uint8))
    path = tmp_path / "other.json"
    path.write_text(json.dumps([{**category, "name": category["name"].upper()} for category in CATEGORIES[::-1]]))
    assert [c["id"] for c in open_dataset("folder", root=root, categories=path).categories] == [70, 4]
    path.write_text(json.dumps([{"id": 4, "name": "grass", "isthing": 0}, {"id": 70, "name": "cat", "isthing": 1}]))
    with pytest.raises(ValueError, match=r"id 4 'grass', but .*categories.json calls it 'cat', and 1 more"):
        open_dataset("folder", root=root, categories=path)
    (root / "categories.json").write_text("no JSON")
    assert len(open_dataset("folder", root=root, categories=path).categories) == 2
