"""Every architecture does every task: by hand, in a pipeline and in an evaluation, at whatever stride its masks are."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from helpers import TINY_SWIN, tiny_model
from proscale_hf import ProScaleMask2FormerForUniversalSegmentation, ProScaleMask2FormerImageProcessorPil
from proscale_hf.data.sample import Sample
from proscale_hf.evaluation.evaluator import Evaluator
from proscale_hf.models.mask2former.presets import ARCHITECTURES


TASKS = ["panoptic", "instance", "semantic"]
STUFF = [2, 3]
SIZE = (60, 90)  # of the photo
PADDED = (64, 96)
TARGET = (41, 77)
EDGE = 64  # columns of the photo left of it are an object of class 0, the others are of class 2
KEEP_ALL = {"threshold": 0.0, "overlap_mask_area_threshold": 0.0}
MASK_STRIDE = {"rt": 8}  # of the others 4


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(architecture) -> ProScaleMask2FormerForUniversalSegmentation:
    settings = dict(ARCHITECTURES[architecture])
    if architecture == "rt":
        settings["backbone_config"] = {**TINY_SWIN, "out_features": TINY_SWIN["out_features"][1:]}
    return tiny_model(seed=1, **settings)  # whose masks leave something of each photo


@pytest.fixture
def processor() -> ProScaleMask2FormerImageProcessorPil:
    return ProScaleMask2FormerImageProcessorPil(do_resize=False, label_ids_to_fuse=STUFF)


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8))


@torch.no_grad()
def outputs_of(model, processor, photo):
    return model(**processor(photo, return_tensors="pt"))


def right_outputs_of(model, processor, photo):
    """The model's outputs, with logits that find the two objects on both sides of `EDGE`."""
    outputs = outputs_of(model, processor, photo)
    edge = outputs.masks_queries_logits.shape[-1] * EDGE // PADDED[1]
    outputs.masks_queries_logits[:] = -20.0
    outputs.masks_queries_logits[0, 0, :, :edge] = 20.0
    outputs.masks_queries_logits[0, 1, :, edge:] = 20.0
    outputs.class_queries_logits[:] = 0.0
    outputs.class_queries_logits[0, [0, 1], [0, 2]] = 20.0
    outputs.class_queries_logits[0, 2:, -1] = 20.0
    return outputs


def test_the_model_says_how_large_its_batch_was(architecture, model, processor, photo):
    inputs = processor([photo, photo], return_tensors="pt")
    with torch.no_grad():
        known, unknown = model(**inputs), model(inputs["pixel_values"])
    assert known.padded_sizes.dtype == torch.int64
    assert known.padded_sizes.tolist() == unknown.padded_sizes.tolist() == [list(PADDED)] * 2
    stride = MASK_STRIDE.get(architecture, 4)
    assert known.masks_queries_logits.shape[-2:] == (PADDED[0] // stride, PADDED[1] // stride)


@pytest.mark.parametrize("target", [SIZE, TARGET])
def test_photos_are_segmented(model, processor, photo, target):
    outputs = outputs_of(model, processor, photo)
    [panoptic] = processor.post_process_panoptic_segmentation(outputs, target_sizes=[target], **KEEP_ALL)
    assert panoptic["segmentation"].shape == target
    assert (
        set(panoptic["segmentation"].unique().tolist()) - {0} == {s["id"] for s in panoptic["segments_info"]} != set()
    )
    [instances] = processor.post_process_instance_segmentation(outputs, target_sizes=[target], threshold=0.0)
    assert instances["segmentation"].shape == target
    assert {segment["label_id"] for segment in instances["segments_info"]} == {0, 1}
    [label_map] = processor.post_process_semantic_segmentation(outputs, target_sizes=[target])
    assert label_map.shape == target


def test_padding_is_cropped_at_the_masks_own_stride(model, processor, photo):
    outputs = right_outputs_of(model, processor, photo)
    for target in (SIZE, TARGET, (96, 64)):
        [result] = processor.post_process_panoptic_segmentation(outputs, target_sizes=[target])
        assert [segment["label_id"] for segment in result["segments_info"]] == [0, 2]
        share = (result["segmentation"] == 1).float().mean().item()
        assert share == pytest.approx(EDGE / SIZE[1], abs=0.5 / target[1])


@pytest.mark.parametrize("task", TASKS)
def test_photos_go_through_a_pipeline(model, processor, photo, task):
    segmenter = pipeline("image-segmentation", model=model, image_processor=processor, device="cpu")
    options = {} if task == "semantic" else KEEP_ALL
    segments = segmenter(photo, subtask=task, **options)
    assert segments
    assert all(segment["mask"].size == photo.size for segment in segments)
    labels = [segment["label"] for segment in segments]
    if task == "instance":
        assert set(labels) == {"LABEL_0", "LABEL_1"}
    stuff = [label for label in labels if label in ("LABEL_2", "LABEL_3")]
    assert len(stuff) == len(set(stuff))


def test_photos_are_evaluated(model, processor, photo):
    segment_map = np.ones(SIZE, dtype=np.int32)
    segment_map[:, EDGE:] = 2
    segments = [{"id": 1, "label_id": 0, "iscrowd": 0}, {"id": 2, "label_id": 2, "iscrowd": 0}]
    categories = [{"id": label, "name": f"class {label}", "isthing": int(label not in STUFF)} for label in range(4)]
    evaluator = Evaluator(categories, TASKS)
    outputs = right_outputs_of(model, processor, photo)
    evaluator.update([Sample(photo, "photo", "photo.png", segments, segment_map)], outputs, processor)
    results = evaluator.compute()
    assert results["panoptic"]["All"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 2}
    assert results["instance"]["AP"] == pytest.approx(1.0)
    assert results["semantic"]["mIoU"] == 1.0
