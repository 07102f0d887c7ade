"""Training on nothing is refused, whatever the data set is."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image


datasets = pytest.importorskip("datasets")

from evaluation_data import instance_json, open_set, write_set
from proscale_hf.data.collate import TransformedDataset
from proscale_hf.data.objects import check_objects
from proscale_hf.data.opening import open_dataset
from proscale_hf.data.sample import SampleError
from proscale_hf.data.sources.coco import CocoInstance, CocoPanoptic


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def refused(dataset):
    with pytest.raises(ValueError, match=r"nothing to train on: none of the \d images has an object.*rowds") as error:
        check_objects(dataset)
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "set", 3)


def instances(folder, path, change):
    content = json.loads(instance_json(path, folder).read_text())
    change(content["annotations"])
    path.write_text(json.dumps(content))
    return open_dataset("coco_instance", images=str(folder / "images"), annotations=str(path))


def make_crowds(annotations):
    for annotation in annotations:
        annotation["iscrowd"] = "1"


def leave_one_object(annotations):
    make_crowds(annotations)
    annotations[-1]["iscrowd"] = "0"


def make_small(annotations):
    for annotation in annotations:
        annotation |= {"iscrowd": 0, "segmentation": [[0.1, 0.1, 0.2, 0.1, 0.2, 0.2]]}


def test_instances(folder, tmp_path, monkeypatch):
    check_objects(instances(folder, tmp_path / "a.json", leave_one_object))
    refused(instances(folder, tmp_path / "b.json", make_small))
    monkeypatch.setattr(CocoInstance, "read", None)  # the list of images tells it
    refused(instances(folder, tmp_path / "c.json", make_crowds))
    refused(instances(folder, tmp_path / "d.json", list.clear))


def test_panoptic(folder, monkeypatch):
    check_objects(open_set(folder))
    content = json.loads((folder / "panoptic.json").read_text())
    for annotation in content["annotations"]:
        make_crowds(annotation["segments_info"])
    (folder / "panoptic.json").write_text(json.dumps(content))
    monkeypatch.setattr(CocoPanoptic, "read", None)
    refused(open_set(folder))


def test_maps_that_are_void(tmp_path):
    for name in ("images", "annotations"):
        (tmp_path / name).mkdir()
    for number in range(3):
        Image.new("RGB", (4, 3)).save(tmp_path / "images" / f"{number}.png")
        Image.new("L", (4, 3), 255).save(tmp_path / "annotations" / f"{number}.png")
    (tmp_path / "categories.json").write_text(json.dumps([{"id": 1, "name": "cat", "isthing": 1}]))
    dataset = open_dataset("folder", root=str(tmp_path))
    refused(dataset)
    refused(TransformedDataset(dataset, None))
    Image.new("L", (4, 3), 1).save(tmp_path / "annotations" / "2.png")
    check_objects(dataset)
    for number in range(3):
        (tmp_path / "annotations" / f"{number}.png").write_bytes(b"")
    with pytest.raises(SampleError, match=r"\d.png is empty"):
        check_objects(dataset)
    Image.new("L", (4, 3), 1).save(tmp_path / "annotations" / "0.png")
    check_objects(open_dataset("folder", root=str(tmp_path), on_error="skip"))


def example(values, **others):
    return {"class_labels": torch.zeros(len(values), dtype=torch.int64), **others}


def test_examples_for_the_model():
    masks = torch.tensor([[[0, 255], [255, 255]]], dtype=torch.uint8)
    refused([example(masks, mask_labels=masks)] * 3)
    check_objects([example(masks, mask_labels=masks), example(masks, mask_labels=(masks == 0).int())])
    refused([example([], mask_labels=masks[:0])] * 2)
    planes = torch.ones((1, 2, 2), dtype=torch.uint8)
    refused([example(masks, packed_masks=planes)])
    check_objects([example(masks, packed_masks=planes * 3)])
    check_objects([example(masks)])


def test_what_cannot_be_known_passes():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            raise AssertionError

    for dataset in (Endless(), None, [{"pixels": 1}], ["text"], [{"class_labels": None}]):
        check_objects(dataset)


def test_random_numbers_stay():
    class Drawing(list):
        def __getitem__(self, index):
            random.random(), np.random.rand(), torch.rand(1)
            return example([0])

    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    expected = drawn()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    check_objects(Drawing([1, 2]))
    assert drawn() == expected
