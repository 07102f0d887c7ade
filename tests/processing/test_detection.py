"""Labels of COCO's annotations, and detections from logits and boxes."""

import numpy as np
import pytest
import torch
from transformers.image_utils import SizeDict

from proscale_hf.processing.detection import best_detections, detection_labels
from proscale_hf.processing.sizes import ImageSizes, resized_size_in_detr


SIZES = [ImageSizes(original=(100, 200), resized=(50, 100), padded=(60, 100))]


def box(left, top, width, height, **more):
    return {"bbox": [left, top, width, height], "category_id": 3, **more}


def test_labels_are_shares_of_the_image():
    given = {"image_id": 7, "annotations": [box(20, 10, 40, 50), box(0, 0, 200, 100, area=5.0)]}
    [labels] = detection_labels(given, SIZES)
    np.testing.assert_allclose(labels["boxes"], [[0.2, 0.35, 0.2, 0.5], [0.5, 0.5, 1.0, 1.0]], atol=1e-6)
    assert labels["class_labels"].tolist() == [3, 3] and labels["area"].tolist() == [2000, 5]
    assert labels["image_id"].tolist() == [7]
    assert labels["orig_size"].tolist() == [100, 200] and labels["size"].tolist() == [50, 100]


def test_boxes_are_clipped_and_what_is_left_without_area_goes():
    annotations = [box(-10, 90, 30, 50), box(300, 0, 10, 10), box(5, 5, 0, 10), box(1, 1, 9, 9, iscrowd=1)]
    [labels] = detection_labels([{"annotations": annotations}], SIZES)
    np.testing.assert_allclose(labels["boxes"], [[0.05, 0.95, 0.1, 0.1]], atol=1e-6)
    [nothing] = detection_labels([{"annotations": []}], SIZES)
    assert nothing["boxes"].shape == (0, 4) and nothing["class_labels"].shape == (0,) and "image_id" not in nothing


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([{"annotations": []}] * 2, "got 1 images, but annotations for 2"),
        ([{"objects": []}], "image 0: its annotations must be a mapping with `annotations`"),
        ([{"annotations": [box(1, 1, 2, 2), {"bbox": [1, 1, 2, 2]}]}], "image 0, box 1: .* `bbox` and `category_id`"),
        ([{"annotations": [{**box(1, 1, 2, 2), "category_id": -1}]}], "image 0, box 0: `category_id`.* got -1"),
        ([{"annotations": [box(1, float("nan"), 2, 2)]}], r"image 0, box 0: .*nan"),
        ([{"annotations": [box(50, 50, -10, 2)]}], "image 0, box 0: .*not below 0"),
        ([{"annotations": [{**box(1, 1, 2, 2), "bbox": [1, 2, 3]}]}], "image 0, box 0: .*four finite numbers"),
    ],
)
def test_wrong_annotations_are_refused(annotations, message):
    with pytest.raises(ValueError, match=message) as error:
        detection_labels(annotations, SIZES)
    assert "\n" not in str(error.value)


def test_the_best_pairs_of_query_and_class():
    logits = torch.tensor([[[0.0, 2.0, -1.0], [1.0, -3.0, -3.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.9, 0.1, 0.4, 0.4]]])
    [result] = best_detections(logits, boxes, [(100, 200)], threshold=0.4, top_k=300)
    torch.testing.assert_close(result["scores"], torch.tensor([2.0, 1.0, 0.0]).sigmoid())
    assert result["labels"].tolist() == [1, 0, 0]
    expected = torch.tensor([[80.0, 30, 120, 70], [140, 0, 200, 30], [80, 30, 120, 70]])
    torch.testing.assert_close(result["boxes"], expected)  # the second one ends with the image
    [few] = best_detections(logits, boxes, None, threshold=0.0, top_k=2)
    assert few["labels"].tolist() == [1, 0] and few["boxes"].max() == 1
    [none] = best_detections(logits, boxes, [(100, 200)], threshold=0.99, top_k=300)
    assert none["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("original", "resized"),
    [
        ((480, 640), (800, 1066)),
        ((640, 427), (1199, 800)),
        ((612, 612), (800, 800)),
        ((1080, 1920), (750, 1333)),
        ((1200, 300), (1332, 333)),
        ((1, 3000), (1, 3000)),
    ],
)
def test_detr_s_resize_rule(original, resized):
    assert resized_size_in_detr(original, SizeDict(shortest_edge=800, longest_edge=1333)) == resized


def test_other_sizes_are_as_always():
    assert resized_size_in_detr((10, 20), SizeDict(height=7, width=9)) == (7, 9)
    assert resized_size_in_detr((10, 20), SizeDict(longest_edge=10)) == (5, 10)
