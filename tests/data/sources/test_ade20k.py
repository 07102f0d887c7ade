"""ADE20K's own folders give what Mask2Former's `prepare_ade20k_pan_seg.py` makes of them."""

import re

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("datasets")

from proscale_hf.data.opening import open_dataset
from proscale_hf.data.sample import SampleError


# The benchmark's classes, counted from 1, that have instances: in the order in which instance pictures count them.
THING_CLASSES = [
    *[8, 9, 11, 13, 15, 16, 19, 20, 21, 23, 24, 25, 28, 31, 32, 33, 34, 36, 37, 38, 39, 40, 42, 43, 44, 45, 46, 48],
    *[50, 51, 54, 56, 57, 58, 59, 63, 65, 66, 67, 68, 70, 71, 72, 73, 74, 75, 76, 77, 79, 81, 82, 83, 84, 86, 87],
    *[88, 89, 90, 91, 93, 94, 96, 98, 99, 103, 104, 105, 108, 109, 111, 112, 113, 116, 117, 119, 120, 121, 122, 124],
    *[125, 126, 127, 128, 130, 131, 133, 134, 135, 136, 137, 138, 139, 140, 143, 144, 145, 147, 148, 149, 150],
]
# Class 8 is a bed, 13 a person, 150 a flag; instance pictures call them 1, 4 and 100.
CLASSES = [[1, 1, 3, 3, 0, 8], [1, 1, 3, 13, 13, 8], [4, 150, 150, 13, 0, 8], [4, 4, 4, 2, 2, 14]]
THINGS = [[0, 0, 0, 0, 4, 0], [0, 0, 4, 4, 0, 1], [0, 100, 100, 4, 0, 1], [0, 100, 0, 0, 1, 1]]
NUMBERS = [[0, 0, 0, 0, 2, 0], [0, 0, 2, 2, 0, 7], [0, 1, 1, 3, 0, 7], [0, 1, 0, 0, 9, 9]]
# What Mask2Former's script makes of it: the map of ids, and the categories of the ids.
SCRIPT_MAP = [
    [37, 37, 111, 111, 259, 0],
    [37, 37, 259, 259, 0, 333],
    [148, 222, 222, 296, 0, 333],
    [148, 222, 148, 74, 370, 370],
]
SCRIPT_CATEGORIES = {37: 0, 74: 1, 111: 2, 148: 3, 222: 149, 259: 12, 296: 12, 333: 7, 370: 7}


def write(root, name="ADE_val_1", classes=CLASSES, things=THINGS, numbers=NUMBERS, split="validation"):
    pictures = {
        "images": Image.new("RGB", (len(classes[0]), len(classes)), "gray"),
        "annotations": Image.fromarray(np.asarray(classes, dtype=np.uint8)),
        "annotations_instance": Image.fromarray(np.stack([things, numbers, np.zeros_like(things)], -1).astype("u1")),
    }
    for kind, picture in pictures.items():
        folder = root / kind / split
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{name}.{'jpg' if kind == 'images' else 'png'}")
    return root


def test_panoptic_is_what_the_script_makes(tmp_path):
    dataset = open_dataset("ade20k", root=write(tmp_path), split="val")
    sample = dataset[0]
    assert sample.image_id == "ADE_val_1"
    pairs = set(zip(np.ravel(SCRIPT_MAP).tolist(), sample.segment_map.ravel().tolist(), strict=True))
    own_id = dict(pairs)
    assert len(pairs) == len(own_id) == len(sample.segments) + 1 and own_id.pop(0) == 0
    category_of = {segment["id"]: dataset.categories[segment["label_id"]]["id"] for segment in sample.segments}
    assert {their_id: category_of[own] for their_id, own in own_id.items()} == SCRIPT_CATEGORIES
    assert not any(segment["iscrowd"] for segment in sample.segments)


def test_instance_classes_are_the_things_in_order(tmp_path):
    reds = np.arange(1, 101).reshape(10, 10)
    write(tmp_path, classes=np.zeros((10, 10), int), things=reds, numbers=reds)
    dataset = open_dataset("ade20k", root=tmp_path, split="val")
    assert [1 + segment["label_id"] for segment in dataset[0].segments] == THING_CLASSES


def test_pixel_classes_stay_those_of_the_annotation(tmp_path):
    write(tmp_path)
    expected = np.where(np.array(CLASSES) > 0, np.array(CLASSES) - 1, 255)
    panoptic = open_dataset("ade20k", root=tmp_path, split="val")
    assert (panoptic[0].label_map() == expected).all()
    semantic = open_dataset("ade20k", root=tmp_path, split="val", task="semantic")
    assert (semantic[0].label_map() == expected).all()
    assert semantic.source.tasks == ("semantic",)
    assert semantic.categories[0]["id"] == 1 and panoptic.categories[0]["id"] == 0


def test_semantic_does_without_instances(tmp_path):
    write(tmp_path, split="training")
    for path in (tmp_path / "annotations_instance" / "training").iterdir():
        path.unlink()
    assert len(open_dataset("ade20k", root=tmp_path, split="train", task="semantic")) == 1
    with pytest.raises(ValueError, match=r"1 names have no file in .*annotations_instance.training: \[ADE_val_1\]"):
        open_dataset("ade20k", root=tmp_path, split="train")


def test_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"no split 'test' in .*images; there are \[validation\]"):
        open_dataset("ade20k", root=tmp_path, split="test")
    for task in ("instance", ["panoptic"]):
        with pytest.raises(ValueError, match=rf"task must be one of panoptic, semantic, got {re.escape(repr(task))}"):
            open_dataset("ade20k", root=tmp_path, split="val", task=task)

    def first(**options):
        return open_dataset("ade20k", root=tmp_path, split="val", **options)[0]

    for task in ("panoptic", "semantic"):
        write(tmp_path, classes=[[1, 151, 255]], things=[[0, 0, 0]], numbers=[[0, 0, 0]])
        with pytest.raises(SampleError, match=r"annotations.*ADE_val_1.png: values \[151, 255\] stand for no category"):
            first(task=task)
    write(tmp_path, classes=[[1, 1, 1]], things=[[0, 101, 1]], numbers=[[1, 2, 3]])
    with pytest.raises(SampleError, match=r"instance.*ADE_val_1.png: red values \[0, 101\] stand for no category"):
        first()
    write(tmp_path, classes=[[1, 1, 1]], things=[[1, 2, 3]], numbers=[[5, 5, 6]])
    with pytest.raises(SampleError, match=r"ADE_val_1.png: objects \(green values\) \[5\] are of more than one"):
        first()
    write(tmp_path, classes=[[1, 1, 1]], things=[[1, 2]], numbers=[[1, 2]])
    with pytest.raises(SampleError, match=r"ADE_val_1.png and its partner .* differ in size: 1 x 2 and 1 x 3"):
        first()
    write(tmp_path, classes=[[1, 1, 1]], things=[[1, 2, 3]], numbers=[[1, 2, 3]])
    Image.new("RGB", (4, 1)).save(tmp_path / "images" / "validation" / "ADE_val_1.jpg")
    with pytest.raises(
        SampleError, match=r"ADE_val_1.jpg: the image is 1 x 4 \(height x width\), its annotation 1 x 3"
    ):
        first()
    (tmp_path / "annotations" / "validation" / "ADE_val_1.png").write_text("no picture")
    with pytest.raises(SampleError, match=r"ADE_val_1.png cannot be read"):
        first()
