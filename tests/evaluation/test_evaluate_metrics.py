"""The metrics that `evaluate.load` takes: the measures' own numbers, from what post-processing gives."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from paths import FIXTURES, ROOT
from proscale_hf.evaluation.mean_iou import MeanIoU
from proscale_hf.evaluation.metrics.stored_maps import as_array, ids_as_png, labels_as_png


evaluate = pytest.importorskip("evaluate")
METRICS = ROOT / "proscale_hf" / "evaluation" / "metrics"
FIXTURE = FIXTURES / "panoptic_quality"


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
        yield lambda name: evaluate.load(str(METRICS / name), cache_dir=str(folder / "cache"))


def read_images(kind):
    """Maps of ids and segments with "label_id", of the images of a COCO-panoptic file."""
    content = json.loads((FIXTURE / f"panoptic_{kind}.json").read_text())
    for annotation in sorted(content["annotations"], key=lambda annotation: annotation["image_id"]):
        colors = np.asarray(Image.open(FIXTURE / f"panoptic_{kind}" / annotation["file_name"]), dtype=np.int64)
        segments = [
            {"id": segment["id"], "label_id": segment["category_id"], "iscrowd": segment.get("iscrowd", 0)}
            for segment in annotation["segments_info"]
        ]
        yield {"segmentation": torch.from_numpy(colors @ [1, 256, 256**2]), "segments_info": segments}


def test_panoptic_quality(load):
    categories = json.loads((FIXTURE / "panoptic_gt.json").read_text())["categories"]
    metric = load("panoptic_quality")
    predictions, references = list(read_images("pred")), list(read_images("gt"))
    metric.add(prediction=predictions[0], reference=references[0])
    metric.add_batch(predictions=predictions[1:], references=references[1:])
    result = metric.compute(
        thing_label_ids=[category["id"] for category in categories if category["isthing"]],
        stuff_label_ids=[category["id"] for category in categories if not category["isthing"]],
    )
    expected = json.loads((FIXTURE / "expected.json").read_text())
    for group in ("All", "Things", "Stuff"):
        assert result[group] == pytest.approx(expected[group], abs=1e-9)
    assert result["per_class"].keys() == expected["per_class"].keys()


def test_panoptic_quality_names_the_image(load):
    image = {"segmentation": np.ones((2, 2), int), "segments_info": [{"id": 1, "label_id": 3}]}
    metric = load("panoptic_quality")
    metric.add_batch(predictions=[image, {**image, "segments_info": []}], references=[image, image])
    with pytest.raises(ValueError, match=r"Image 1: segments \[1\]"):
        metric.compute(thing_label_ids=[3], stuff_label_ids=[])


def test_mean_iou(load):
    generator = np.random.default_rng(0)
    predictions, references = generator.integers(0, 300, (2, 3, 8, 9))
    references[:, :2] = 999
    metric = load("mean_iou")
    metric.add_batch(predictions=predictions[:2], references=references[:2])
    metric.add_batch(predictions=torch.from_numpy(predictions[2:]), references=[references[2].tolist()])
    measure = MeanIoU(300, ignore_index=999)
    for prediction, reference in zip(predictions, references, strict=True):
        measure.update(prediction, reference)
    assert metric.compute(num_labels=300, ignore_index=999) == measure.compute()


def test_mask_average_precision(load):
    coco_mask = pytest.importorskip("pycocotools.mask")
    masks = np.zeros((20, 30, 2), dtype=np.uint8, order="F")
    masks[2:12, 3:13, 0] = masks[5:15, 20:30, 1] = 1
    codes = coco_mask.encode(masks)
    truth = {"segmentation": codes, "segments_info": [{"label_id": 0}, {"label_id": 4}]}
    found = {
        "segmentation": codes[:1],
        "segments_info": [{"id": 0, "label_id": 0, "was_fused": False, "score": 0.9}],
    }
    empty = {"segmentation": [], "segments_info": []}
    metric = load("mask_average_precision")
    metric.add_batch(predictions=[found, empty], references=[truth, empty])
    metric.add(prediction=empty, reference={**truth, "segments_info": [{"label_id": 4}, {"label_id": 0, "iscrowd": 1}]})
    result = metric.compute()
    assert result["AP"] == pytest.approx(0.5)
    assert result["per_class"] == pytest.approx({"0": 1.0, "4": 0.0})
    assert result["APs"] == pytest.approx(0.5) and result["APl"] == -1


@pytest.mark.parametrize(
    ("as_png", "values", "message"),
    [
        (ids_as_png, [[-1]], "from 0 to 16777215, but has -1 to 0"),
        (ids_as_png, [[256**3]], "16777216"),
        (labels_as_png, [[256**2]], "from 0 to 65535"),
        (as_array, [[0.5]], "whole numbers"),
        (as_array, [1, 2], r"got \(2,\)"),
    ],
)
def test_maps_that_cannot_be_stored_are_refused(as_png, values, message):
    with pytest.raises(ValueError, match=message):
        as_png(values)
