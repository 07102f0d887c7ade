"""The detection models' image processors, from pictures and annotations to labels, and from outputs to boxes."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from helpers import tiny_detector
from proscale_hf import ProScaleDinoImageProcessor, ProScaleDinoImageProcessorPil


pytest.importorskip("torchvision")
BACKENDS = [ProScaleDinoImageProcessorPil, ProScaleDinoImageProcessor]


def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((60, 90), (50, 40))]


ANNOTATIONS = [
    {"image_id": 1, "annotations": [{"bbox": [9, 6, 18, 30], "category_id": 2}]},
    {"image_id": 2, "annotations": []},
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_padded_to_its_largest_image_and_no_further(backend):
    batch = backend(size={"shortest_edge": 45, "longest_edge": 63})(images(), ANNOTATIONS, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 56, 63)  # 42 x 63 and 56 x 45
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [42 * 63, 56 * 45]
    first, second = batch["labels"]
    torch.testing.assert_close(first["boxes"], torch.tensor([[0.2, 0.35, 0.2, 0.5]]))
    assert first["class_labels"].tolist() == [2] and second["boxes"].shape == (0, 4)
    model = tiny_detector().train()
    assert model(**batch).loss.isfinite()
    alone = backend()(images()[0], ANNOTATIONS[0])
    assert len(alone["labels"]) == 1 and "labels" not in backend()(images())


def test_the_backends_agree():
    size = {"shortest_edge": 45, "longest_edge": 63}
    first, second = (backend(size=size)(images(), return_tensors="pt") for backend in BACKENDS)
    assert (first["pixel_values"] - second["pixel_values"]).abs().mean() < 5e-3
    assert torch.equal(first["pixel_mask"], second["pixel_mask"])


def test_results_are_read_by_position_and_from_mappings():
    processor = ProScaleDinoImageProcessorPil()
    outputs = {"logits": torch.randn(2, 5, 4), "pred_boxes": torch.rand(2, 5, 4)}
    results = processor.post_process_object_detection(outputs, 0.5, torch.tensor([[10, 20], [30, 40]]))
    assert len(results) == 2 and all((result["scores"] > 0.5).all() for result in results)
    assert results[1]["boxes"].min() >= 0 and results[1]["boxes"][:, 2].max() <= 40
    with pytest.raises(ValueError, match="got 1 `target_sizes` for a batch of 2"):
        processor.post_process_object_detection(outputs, target_sizes=[(10, 20)])
    with pytest.raises(ValueError, match="need `logits` and `pred_boxes`"):
        processor.post_process_object_detection({"logits": outputs["logits"]})


def test_pipeline(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tiny_detector(id2label={0: "cat", 1: "dog", 2: "cow", 3: "hen"}).save_pretrained(tmp_path)
    ProScaleDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is ProScaleDinoImageProcessor
    detector = pipeline("object-detection", model=str(tmp_path), device="cpu")
    alone = [detector(image, threshold=0.0) for image in images()]
    assert [len(found) for found in alone] == [36, 36]
    for found, image in zip(alone, images(), strict=True):
        for detection in found:
            box = detection["box"]
            assert detection["label"] in {"cat", "dog", "cow", "hen"}
            assert 0 <= box["xmin"] <= box["xmax"] <= image.width and 0 <= box["ymin"] <= box["ymax"] <= image.height
    assert detector(images(), threshold=0.0) == alone
    assert "is not supported" not in caplog.text
