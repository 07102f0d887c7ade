"""Mask AP: pycocotools' own evaluation of whole data sets, parts that add up, and bad input."""

import contextlib
import io
import pickle

import numpy as np
import pytest


pytest.importorskip("pycocotools")
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from proscale_hf.evaluation.average_precision import MaskAveragePrecision


SIZE = (110, 130)
CATEGORIES = [1, 3, 7, 90]
SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def rectangle(top, left, height, width):
    mask = np.zeros(SIZE, dtype=np.uint8, order="F")
    mask[top : top + height, left : left + width] = 1
    return mask


def random_image(generator, crowded):
    """Objects, some of exactly the areas at which sizes change, and predictions near them; many scores are equal."""
    heights = generator.choice([8, 32, 96, 20, 50], generator.integers(0, 7))
    boxes = [(*generator.integers(0, 14, 2), height, generator.choice([height, 30])) for height in heights]
    objects = [rectangle(*box) for box in boxes]
    labels = generator.choice(CATEGORIES[:3], len(boxes)).tolist()
    truth = {
        "masks": [coco_mask.encode(mask) for mask in objects],
        "labels": labels,
        "iscrowd": (generator.random(len(boxes)) < 0.2).astype(int).tolist(),
        "area": [float(mask.sum()) + generator.choice([0, 0.5]) for mask in objects],
    }
    prediction = {"masks": [], "labels": [], "scores": []}
    for index in generator.integers(0, len(boxes), 130 if crowded else 12) if boxes else []:
        jitter = generator.integers(0, 5, 2)
        prediction["masks"].append(coco_mask.encode(rectangle(*(boxes[index][:2] + jitter), *boxes[index][2:])))
        prediction["labels"].append(labels[index] if generator.random() < 0.8 else int(generator.choice(CATEGORIES)))
        prediction["scores"].append(float(generator.choice([0.25, 0.5, generator.random()])))
    if crowded:
        prediction["labels"] = [CATEGORIES[0]] * len(prediction["labels"])
    return prediction, truth


def reference(images):
    """pycocotools' twelve numbers, and AP per class."""
    annotations, results = [], []
    for image_id, (prediction, truth) in images.items():
        for mask, label, iscrowd, area in zip(*truth.values(), strict=True):
            annotation = {"image_id": image_id, "category_id": label, "iscrowd": iscrowd, "area": area}
            annotations.append({**annotation, "id": len(annotations) + 1, "segmentation": dict(mask)})
        for mask, label, score in zip(*prediction.values(), strict=True):
            results.append({"image_id": image_id, "category_id": label, "score": score, "segmentation": dict(mask)})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image_id, "height": SIZE[0], "width": SIZE[1]} for image_id in images],
            "annotations": annotations,
            "categories": [{"id": category} for category in CATEGORIES],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU thresholds, recalls, categories)
    per_class = {str(category): precision[:, :, k].mean() for k, category in enumerate(CATEGORIES)}
    return dict(zip(SUMMARY, evaluation.stats, strict=True)), per_class


def measure(images):
    measure = MaskAveragePrecision(CATEGORIES)
    for image_id, (prediction, truth) in images.items():
        measure.update(image_id, prediction, truth)
    return measure


@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools(seed):
    generator = np.random.default_rng(seed)
    images = {image_id: random_image(generator, crowded=image_id == 5) for image_id in (5, 9, 30, 4, 7, 11, 2, 40)}
    result = measure(images).compute()
    summary, per_class = reference(images)
    assert result.pop("per_class") == pytest.approx(per_class, abs=1e-9)
    assert result == pytest.approx(summary, abs=1e-9)
    assert result["AP50"] > 0.1 and result["AR100"] > result["AR1"] > 0 and per_class["90"] == -1


def test_measures_of_parts_add_up():
    """In any order: it is the image's id that decides among equal scores."""
    generator = np.random.default_rng(8)
    images = {image_id: random_image(generator, crowded=False) for image_id in range(6)}
    whole = measure(images)
    first, second = (measure({i: images[i] for i in ids}) for ids in ((5, 1, 0), (2, 4, 3)))
    first.merge(pickle.loads(pickle.dumps(second.state())))
    assert first.compute() == whole.compute()
    with pytest.raises(ValueError, match=r"Images \[2, 3, 4\] were counted twice"):
        first.merge(second.state())
    with pytest.raises(ValueError, match="other categories"):
        first.merge(MaskAveragePrecision([1]).state())


def test_masks_are_not_kept():
    kept = measure({1: random_image(np.random.default_rng(2), crowded=True)})
    assert len(kept.images[1].scores) == 100  # of 130, all of one category
    assert sum(array.nbytes for array in kept.images[1]) == 100 * 56


def test_images_without_anything():
    nothing = {"masks": [], "labels": [], "scores": []}, {"masks": [], "labels": [], "iscrowd": [], "area": []}
    result = measure({1: nothing, "two": nothing}).compute()
    assert set(result.pop("per_class").values()) == set(result.values()) == {-1.0}


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        ({"labels": [2]}, "Image 3: the prediction has an instance of the unknown category 2"),
        ({"scores": [float("nan")]}, "whose score is nan"),
        ({"scores": []}, "different lengths: 1 masks, 1 labels, 0 scores"),
        ({"masks": [coco_mask.encode(np.ones((2, 3), np.uint8, order="F"))]}, r"sizes .* \[\(2, 3\), \(110, 130\)\]"),
        ({"masks": [{"size": SIZE, "counts": [1, 2]}]}, "compressed"),
    ],
)
def test_bad_input_is_named(prediction, message):
    mask = coco_mask.encode(rectangle(0, 0, 9, 9))
    truth = {"masks": [mask], "labels": [1], "iscrowd": [0], "area": [81]}
    prediction = {"masks": [mask], "labels": [1], "scores": [0.5], **prediction}
    with pytest.raises(ValueError, match=message):
        measure({3: (prediction, truth)})


def test_areas_of_the_truth_must_be_numbers():
    mask = coco_mask.encode(rectangle(0, 0, 9, 9))
    truth = {"masks": [mask], "labels": [1], "iscrowd": [0], "area": [float("nan")]}
    with pytest.raises(ValueError, match="Image 3: the truth has an instance whose area is nan"):
        measure({3: ({"masks": [], "labels": [], "scores": []}, truth)})


def test_an_image_counts_once():
    image = random_image(np.random.default_rng(2), crowded=False)
    counted = measure({3: image})
    with pytest.raises(ValueError, match="Image 3 was counted before"):
        counted.update(3, *image)
