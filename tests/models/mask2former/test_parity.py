"""The original's recorded numbers: every stage of a converted model, its results and its losses.

One set lies in `fixtures/parity_r50`. `PROSCALE_PARITY_DIR` may name a folder with more sets of the same kind.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers import as_products
from parity_sets import recorded_sets
from proscale_hf import ProScaleMask2FormerImageProcessorPil
from proscale_hf.convert.detectron2 import convert_checkpoint
from proscale_hf.processing.packed_masks import pack_masks


SETS = recorded_sets()
DRAWS = 24  # of the random points


@pytest.fixture(params=SETS, ids=lambda path: path.name)
def recorded(request):
    return load(request.param)


@cache
def load(folder: Path):
    """(model, image processor, recorded tensors, recorded facts, the model's output for the recorded images)"""
    model, processor = convert_checkpoint(folder / "config.yaml", folder / "model_final.pth")
    tensors = load_file(folder / "expected.safetensors")
    maps = folder / "expected_maps.npz"
    if maps.exists():
        tensors |= {name: torch.from_numpy(value) for name, value in np.load(maps).items()}
    facts = json.loads((folder / "expected.json").read_text())
    images = [Image.open(folder / f"image_{i}.png") for i in range(2)]
    stuff = facts["stuff_classes"]
    pil = ProScaleMask2FormerImageProcessorPil(
        do_resize=False,
        label_ids_to_fuse=stuff,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
    )
    inputs = pil(images, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True, output_auxiliary_logits=True)
    return model, pil, tensors, facts, inputs, output


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def test_every_recorded_tensor(recorded):
    _, _, tensors, _, inputs, output = recorded
    first = output.auxiliary_logits[0]
    actual = {
        "pixel_values": inputs["pixel_values"],
        **{f"backbone.res{i + 2}": feature_map for i, feature_map in enumerate(output.encoder_hidden_states)},
        **{f"multi_scale_features.{i}": m for i, m in enumerate(output.pixel_decoder_hidden_states)},
        "mask_features": output.pixel_decoder_last_hidden_state,
        "class_queries_logits": output.class_queries_logits,
        "masks_queries_logits": output.masks_queries_logits,
        **{f"aux.0.{name}": value for name, value in first.items()},
    }
    errors = {name: relative_error(value, tensors[name]) for name, value in actual.items() if name in tensors}
    assert len(errors) >= 9
    assert max(errors.values()) < 1e-5, errors


def test_panoptic_results(recorded):
    _, processor, tensors, facts, _, output = recorded
    results = processor.post_process_panoptic_segmentation(
        output,
        threshold=facts["object_mask_threshold"],
        overlap_mask_area_threshold=facts["overlap_threshold"],
        target_sizes=[image["target_size"] for image in facts["images"]],
    )
    for i, (result, image) in enumerate(zip(results, facts["images"], strict=True)):
        segments = [(s["id"], not s["was_fused"], s["label_id"]) for s in result["segments_info"]]
        assert segments == [(s["id"], s["isthing"], s["category_id"]) for s in image["segments_info"]]
        assert (result["segmentation"] == tensors[f"panoptic_seg_{i}"]).float().mean() >= 0.999


def test_semantic_results(recorded):
    _, processor, tensors, facts, _, output = recorded
    sizes = [image["target_size"] for image in facts["images"]]
    for i, result in enumerate(processor.post_process_semantic_segmentation(output, target_sizes=sizes)):
        assert (result == tensors[f"sem_seg_argmax_{i}"]).float().mean() >= 0.999


def test_losses(recorded):
    model, _, tensors, facts, _, output = recorded
    predictions = [*output.auxiliary_logits, output]
    class_logits = torch.stack([prediction["class_queries_logits"] for prediction in predictions])
    mask_logits = torch.stack([prediction["masks_queries_logits"] for prediction in predictions])
    packed_masks = [pack_masks(tensors["mask_labels_0"]), pack_masks(tensors["mask_labels_1"])]
    class_labels = [tensors["class_labels_0"], tensors["class_labels_1"]]
    torch.manual_seed(0)
    masks = as_products(mask_logits)
    draws = [model.criterion(class_logits, *masks, packed_masks, class_labels) for _ in range(DRAWS)]
    assert len(draws[0]) == len(facts["losses"])
    for name, expected in facts["losses"].items():
        values = torch.stack([draw[name.replace("loss_ce", "loss_cross_entropy")] for draw in draws])
        standard_error = (expected["sem"] ** 2 + values.var().item() / DRAWS) ** 0.5
        assert abs(values.mean().item() - expected["mean"]) < 4 * standard_error + 1e-6, name
