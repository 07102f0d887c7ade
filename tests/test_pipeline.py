"""`pipeline("image-segmentation")` from a saved folder: all subtasks, alone and in batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Pipeline, pipeline

from helpers import tiny_model
from proscale_hf import ProScaleMask2FormerImageProcessorPil


pytest.importorskip("torchvision", reason="AutoImageProcessor of transformers 5.17 needs it")

LABELS = {0: "cat", 1: "dog", 2: "sky", 3: "road"}
STUFF = {"sky", "road"}
SUBTASKS = ["panoptic", "instance", "semantic"]
KEEP_ALL = {"threshold": 0.0, "overlap_mask_area_threshold": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose queries differ enough to give segments of several classes."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(id2label=LABELS, label2id={name: label_id for label_id, name in LABELS.items()})
    torch.manual_seed(7)
    with torch.no_grad():
        for layer in model.model.transformer_module.decoder.mask_predictor.mask_embedder:
            layer[0].weight.normal_(std=0.5)
            layer[0].bias.normal_()
        model.model.transformer_module.queries_features.weight.normal_(std=3)
        model.class_predictor.weight.normal_(std=0.5)
        model.class_predictor.bias.normal_(std=0.1)
    model.save_pretrained(folder)
    ProScaleMask2FormerImageProcessorPil(
        size={"shortest_edge": 64, "longest_edge": 96},
        pad_size={"height": 96, "width": 96},
        label_ids_to_fuse=[label_id for label_id, name in LABELS.items() if name in STUFF],
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segmenter(folder) -> Pipeline:
    return pipeline("image-segmentation", model=str(folder), device="cpu")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """A wide and a tall one."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)) for size in ((50, 90, 3), (70, 60, 3))]


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
        assert {segment["label"] for segment in segments} <= set(LABELS.values())
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
    assert {segment["label"] for segment in instance} <= set(LABELS.values()) - STUFF
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
