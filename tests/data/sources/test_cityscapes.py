"""Cityscapes' own folders give what `createPanopticImgs.py` of cityscapesscripts makes of them."""

import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("datasets")

from proscale_hf.data.opening import open_dataset
from proscale_hf.data.sample import SampleError


NAME = "bonn_000003_000019"
INSTANCE_IDS = [
    [23, 23, 26001, 26001, 24, 9],
    [26, 26, 26001, 26000, 24, 30002],
    [7, 7, 26, 25255, 29, 0],
    [7, 7, 33001, 33001, 33, 4],
]
# What cityscapesscripts 2.3.0 makes of it: the map of ids, and id, category, iscrowd, area of its segments.
SCRIPTS_MAP = [
    [23, 23, 26001, 26001, 24, 0],
    [26, 26, 26001, 26000, 24, 0],
    [7, 7, 26, 25255, 0, 0],
    [7, 7, 33001, 33001, 33, 0],
]
SCRIPTS_SEGMENTS = [
    (7, 7, 0, 4),
    (23, 23, 0, 2),
    (24, 24, 1, 2),
    (26, 26, 1, 3),
    (33, 33, 1, 1),
    (25255, 25, 0, 1),
    (26000, 26, 0, 1),
    (26001, 26, 0, 3),
    (33001, 33, 0, 2),
]


def write(root, name=NAME, values=INSTANCE_IDS, split="val"):
    city = name.split("_")[0]
    images, annotations = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
    for folder in (images, annotations):
        folder.mkdir(parents=True, exist_ok=True)
    values = np.asarray(values, dtype=np.uint16)
    labels = np.where(values < 1000, values, values // 1000).astype(np.uint8)
    Image.new("RGB", values.shape[::-1], "gray").save(images / f"{name}_leftImg8bit.png")
    Image.fromarray(values).save(annotations / f"{name}_gtFine_instanceIds.png")
    Image.fromarray(labels).save(annotations / f"{name}_gtFine_labelIds.png")
    Image.new("RGB", values.shape[::-1]).save(annotations / f"{name}_gtFine_color.png")
    return root


def facts(sample, categories):
    areas = Counter(sample.segment_map.ravel().tolist())
    return [
        (segment["id"], categories[segment["label_id"]]["id"], segment["iscrowd"], areas[segment["id"]])
        for segment in sample.segments
    ]


def test_panoptic_is_what_the_scripts_make(tmp_path):
    dataset = open_dataset("cityscapes", root=write(tmp_path), split="val")
    sample = dataset[0]
    assert sample.image_id == NAME and sample.image.size == (6, 4)
    assert sample.segment_map.tolist() == SCRIPTS_MAP and sample.segment_map.dtype == np.int32
    assert facts(sample, dataset.categories) == SCRIPTS_SEGMENTS
    assert dataset.source.tasks == ("panoptic", "instance", "semantic")


def test_groups_and_uncounted_classes_are_void_in_training(tmp_path):
    dataset = open_dataset("cityscapes", root=write(tmp_path), split="val")
    planes, labels = dataset[0].packed_masks()
    names = [dataset.categories[label]["name"] for label in labels.tolist()]
    assert names == ["road", "sky", "rider", "car", "car", "bicycle"]
    void = np.isin(INSTANCE_IDS, [24, 26, 33, 9, 30002, 29, 0, 4])
    assert ((planes[0].numpy() & 1).astype(bool) == void).all()


def test_semantic_is_the_label_images(tmp_path):
    write(tmp_path)
    semantic = open_dataset("cityscapes", root=tmp_path, split="val", task="semantic")
    assert semantic.source.tasks == ("semantic",)
    sample = semantic[0]
    assert [segment["id"] for segment in sample.segments] == [7, 23, 24, 25, 26, 33]
    assert not any(segment["iscrowd"] for segment in sample.segments)
    panoptic = open_dataset("cityscapes", root=tmp_path, split="val")[0]
    assert (sample.label_map() == panoptic.label_map()).all()
    assert sample.label_map()[0].tolist() == [10, 10, 13, 13, 11, 255]


def test_cities_and_splits(tmp_path):
    for name in ("ulm_000000_000019", "bonn_000001_000019", "bonn_000000_000019"):
        write(tmp_path, name, split="train")
    write(tmp_path)
    train = open_dataset("cityscapes", root=tmp_path, split="train")
    assert [sample.image_id for sample in train] == [
        "bonn_000000_000019",
        "bonn_000001_000019",
        "ulm_000000_000019",
    ]
    for name in ("zurich_000000_000019", "bonn_000002_000019"):  # a new city, and a new image in an old one
        count = len(open_dataset("cityscapes", root=tmp_path, split="train"))
        write(tmp_path, name, split="train")
        assert len(open_dataset("cityscapes", root=tmp_path, split="train")) == count + 1


def test_all_void_is_an_empty_sample(tmp_path):
    sample = open_dataset("cityscapes", root=write(tmp_path, values=[[0, 3], [29001, 9]]), split="val")[0]
    assert sample.segments == [] and not sample.segment_map.any()


def test_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*nowhere.leftImg8bit; check root"):
        open_dataset("cityscapes", root=tmp_path / "nowhere", split="val")
    write(tmp_path, values=[[7, 34], [65535, 23]])
    with pytest.raises(ValueError, match=r"no split 'valid' in .*leftImg8bit; there are \[val\]"):
        open_dataset("cityscapes", root=tmp_path, split="valid")
    for task in ("instance", ["panoptic"]):
        with pytest.raises(ValueError, match=rf"task must be one of panoptic, semantic, got {re.escape(repr(task))}"):
            open_dataset("cityscapes", root=tmp_path, split="val", task=task)
    with pytest.raises(SampleError, match=rf"{NAME}_gtFine_instanceIds.png: values \[34, 65535\] stand for no class"):
        open_dataset("cityscapes", root=tmp_path, split="val")[0]

    image = tmp_path / "leftImg8bit" / "val" / "bonn" / f"{NAME}_leftImg8bit.png"
    write(tmp_path)
    Image.new("RGB", (5, 4)).save(image)
    with pytest.raises(SampleError, match=rf"{NAME}.* is 4 x 5 \(height x width\), its annotation 4 x 6"):
        open_dataset("cityscapes", root=tmp_path, split="val")[0]
    image.unlink()
    with pytest.raises(ValueError, match=rf"1 names have no file in .*leftImg8bit.val: \[{NAME}\]"):
        open_dataset("cityscapes", root=tmp_path, split="val")
