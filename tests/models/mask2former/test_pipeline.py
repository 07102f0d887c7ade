"""`pipeline("image-segmentation")` from a saved folder: all subtasks, alone and in batches."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Pipeline, pipeline

from paths import ROOT
from proscale_hf import ProScaleMask2FormerImageProcessorPil


pytest.importorskip("torchvision", reason="AutoImageProcessor of transformers 5.17 needs it")

DEMO_MODEL = ROOT / "proscale_hf" / "demo_model"
STUFF = {"brick", "grass", "gravel"}
LABELS = {*(f"digit {digit}" for digit in range(10)), *STUFF}
SUBTASKS = ["panoptic", "instance", "semantic"]
KEEP_ALL = {"threshold": 0.0, "overlap_mask_area_threshold": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model that ships with the package, with a processor that pads every image to one size."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DEMO_MODEL / name, folder)
    processor = ProScaleMask2FormerImageProcessorPil.from_pretrained(DEMO_MODEL, pad_size={"height": 256, "width": 256})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segmenter(folder) -> Pipeline:
    return pipeline("image-segmentation", model=str(folder), device="cpu")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """A wide and a tall one."""
    scene = Image.open(ROOT / "examples" / "scene.png")
    return [scene, scene.crop((40, 0, scene.width, scene.height))]


def masks_of(segments: list[dict]) -> np.ndarray:
    """(segments, height, width) bool."""
    masks = np.stack([np.asarray(segment["mask"]) for segment in segments])
    assert set(np.unique(masks)) <= {0, 255}
    return masks > 0


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_segments_have_names_and_masks_of_the_image_size(segmenter, images, subtask):
    for image in images:
        segments = segmenter(image, subtask=subtask, **KEEP_ALL)
        assert len(segments) > 1
        masks = masks_of(segments)
        assert masks.shape[1:] == (image.height, image.width)
        assert len({segment["label"] for segment in segments}) > 1
        assert {segment["label"] for segment in segments} <= LABELS
        if subtask != "semantic":
            assert all(0 <= segment["score"] <= 1 for segment in segments)


def test_what_the_subtasks_promise(segmenter, images):
    image = images[0]
    semantic = segmenter(image, subtask="semantic")
    assert (masks_of(semantic).sum(0) == 1).all()

    panoptic = segmenter(image, subtask="panoptic", **KEEP_ALL)
    assert (masks_of(panoptic).sum(0) <= 1).all()
    assert masks_of(panoptic).any((1, 2)).all()
    stuff = [segment["label"] for segment in panoptic if segment["label"] in STUFF]
    assert stuff and len(stuff) == len(set(stuff))

    instance = segmenter(image, subtask="instance", **KEEP_ALL)
    assert {segment["label"] for segment in instance} <= LABELS - STUFF
    scores = [segment["score"] for segment in instance]
    assert scores == sorted(scores, reverse=True)
    confident = segmenter(image, subtask="instance", threshold=np.median(scores))
    assert 0 < len(confident) < len(instance)


def test_panoptic_is_the_default(segmenter, images):
    default, panoptic = segmenter(images[0], **KEEP_ALL), segmenter(images[0], subtask="panoptic", **KEEP_ALL)
    assert [segment["label"] for segment in default] == [segment["label"] for segment in panoptic]
    assert (masks_of(default) == masks_of(panoptic)).all()


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_a_batch_gives_what_each_image_gives_alone(segmenter, images, subtask):
    """The processor's fixed `pad_size` lets the pipeline put images of different sizes into one batch."""
    together = segmenter(images, subtask=subtask, batch_size=2, **KEEP_ALL)
    for image, batched in zip(images, together, strict=True):
        alone = segmenter(image, subtask=subtask, **KEEP_ALL)
        assert [segment["label"] for segment in batched] == [segment["label"] for segment in alone]
        if subtask != "semantic":
            scores = [[segment["score"] for segment in segments] for segments in (batched, alone)]
            np.testing.assert_allclose(*scores, atol=1e-4)
        assert (masks_of(batched) != masks_of(alone)).mean() < 1e-3


def test_the_pipeline_gives_what_model_and_processor_give(segmenter, images):
    image = images[1]
    inputs = segmenter.image_processor(image, return_tensors="pt")
    with torch.no_grad():
        outputs = segmenter.model(**inputs)
    expected = segmenter.image_processor.post_process_semantic_segmentation(
        outputs, target_sizes=[(image.height, image.width)]
    )[0].numpy()
    for segment in segmenter(image, subtask="semantic"):
        label_id = segmenter.model.config.label2id[segment["label"]]
        assert (masks_of([segment])[0] == (expected == label_id)).all()
