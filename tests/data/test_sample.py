"""Samples: what is refused, and what becomes of segments, crowds and void in the targets."""

import numpy as np
import pytest
import torch
from PIL import Image

from proscale_hf.data.sample import Sample, SampleError, distinct_values
from proscale_hf.files.text import few
from proscale_hf.processing.packed_masks import unpack_masks


coco_mask = pytest.importorskip("pycocotools.mask")


def segment(number, label_id, iscrowd=0):
    return {"id": number, "label_id": label_id, "iscrowd": iscrowd}


def sample(segments, size=(6, 8), **others):
    return Sample(Image.new("RGB", size[::-1]), 1, "a.jpg", segments, **others)


def rectangle(top, left, bottom, right, size=(6, 8)):
    mask = np.zeros(size, dtype=np.uint8, order="F")
    mask[top:bottom, left:right] = 1
    return mask


def test_targets_of_a_map():
    segment_map = np.zeros((6, 8), dtype=np.int32)
    segment_map[:2], segment_map[2:4], segment_map[4, :5] = 70_000, 3, 9
    planes, labels = sample(
        [segment(3, 5), segment(9, 0, iscrowd=1), segment(70_000, 2)], segment_map=segment_map
    ).packed_masks()
    assert labels.tolist() == [5, 2] and labels.dtype == torch.int64
    void = (segment_map == 0) | (segment_map == 9)
    expected = np.stack([np.where(void, 255, segment_map == number) for number in (3, 70_000)])
    assert np.array_equal(unpack_masks(planes, 2).numpy(), expected)


def test_targets_of_masks_that_overlap():
    masks = [rectangle(0, 0, 4, 4), rectangle(0, 0, 0, 0), rectangle(2, 2, 6, 8), rectangle(0, 3, 3, 6)]
    segments = [segment(1, 4), segment(2, 6), segment(3, 1), segment(4, 4, iscrowd=1)]
    planes, labels = sample(segments, masks=[coco_mask.encode(mask) for mask in masks]).packed_masks()
    assert labels.tolist() == [4, 1]  # the second has no pixel
    crowd_alone = (masks[3] == 1) & (masks[0] == 0) & (masks[2] == 0)
    expected = np.stack([np.where(crowd_alone, 255, mask) for mask in (masks[0], masks[2])])
    assert np.array_equal(unpack_masks(planes, 2).numpy(), expected)


def test_targets_of_more_objects_than_a_plane_holds():
    masks = [rectangle(0, 0, 1 + i % 6, 1 + i % 8) for i in range(20)]
    segments = [segment(i + 1, i) for i in range(20)]
    planes, labels = sample(segments, masks=[coco_mask.encode(mask) for mask in masks]).packed_masks()
    assert planes.shape == (3, 6, 8) and labels.tolist() == list(range(20))
    assert np.array_equal(unpack_masks(planes, 20).numpy(), np.stack(masks))


@pytest.mark.parametrize("others", [{"segment_map": np.zeros((6, 8), np.int32)}, {"masks": []}])
def test_targets_of_an_image_without_objects(others):
    planes, labels = sample([], **others).packed_masks()
    assert planes.shape == (1, 6, 8) and labels.shape == (0,)
    assert bool(planes.all()) == ("segment_map" in others)  # an empty map says nothing, no masks say background


def test_label_map():
    segment_map = np.array([[5, 5, 0], [2, 2, 7]], dtype=np.int32)
    one = sample([segment(5, 1), segment(2, 3), segment(7, 4, iscrowd=1)], size=(2, 3), segment_map=segment_map)
    assert one.label_map().tolist() == [[1, 1, 255], [3, 3, 4]]
    assert one.label_map(void=-1).tolist() == [[1, 1, -1], [3, 3, 4]]
    with pytest.raises(ValueError, match="overlap"):
        sample([], masks=[]).label_map()


@pytest.mark.parametrize(
    ("segments", "others", "message"),
    [
        ([], {}, "either a segment map or masks"),
        ([], {"masks": [], "segment_map": np.zeros((6, 8), np.int32)}, "either a segment map or masks"),
        ([], {"segment_map": np.zeros((6, 9), np.int32)}, "the image is 6 x 8 .* annotation 6 x 9"),
        ([], {"segment_map": np.zeros((8, 6), np.int32)}, "EXIF"),
        ([], {"segment_map": np.full((6, 8), 4, np.int32)}, r"ids \[4\] are in the map alone"),
        ([segment(4, 1)], {"segment_map": np.zeros((6, 8), np.int32)}, r"ids \[4\] in the list alone"),
        ([segment(4, 1), segment(4, 2)], {"segment_map": np.full((6, 8), 4, np.int32)}, "unique"),
        ([segment(0, 1)], {"segment_map": np.zeros((6, 8), np.int32)}, "positive"),
        ([segment(1, 1)], {"masks": []}, "1 segments have 0 masks"),
        ([segment(1, 1)], {"masks": [{"size": [3, 3], "counts": b"9"}]}, "annotation 3 x 3"),
    ],
)
def test_refused(segments, others, message):
    with pytest.raises(SampleError, match=message) as error:
        sample(segments, **others)
    assert str(error.value).startswith("a.jpg: ") and "\n" not in str(error.value)


def test_distinct_values():
    generator = np.random.default_rng(0)
    regions = np.repeat(np.repeat(generator.integers(0, 50, (5, 7)), 9, axis=0), 11, axis=1)
    for values in (regions, generator.integers(0, 2**24, (20, 30)), np.array([[3]]), np.zeros((0, 4), int)):
        assert np.array_equal(distinct_values(values), np.unique(values))


def test_few_ids():
    assert few({10, "b", 2, "a"}) == "[2, 10, a, b]"
    assert few(range(11)) == "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...]"
