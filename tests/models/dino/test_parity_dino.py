"""The original DINO's recorded numbers: every stage of a converted model, its results, its losses and gradients.

`PROSCALE_PARITY_DIR` names the folder that has the recorded sets.
"""

import json
import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from parity_sets import recorded_detection_sets
from proscale_hf import ProScaleDinoImageProcessorPil
from proscale_hf.convert.dino import convert_checkpoint
from proscale_hf.convert.dino_names import coarse_to_fine, target_names
from proscale_hf.convert.dino_verification import compare_with_recorded
from proscale_hf.models.dino.denoising import Noise, attention_between
from proscale_hf.processing.detection import best_detections


SETS = recorded_detection_sets()
TOLERANCE = 1e-4
PIXELS = 1e-3  # the largest error of a box
pytestmark = pytest.mark.skipif(not SETS, reason="PROSCALE_PARITY_DIR names no recorded sets of detection")


@pytest.fixture(params=SETS, ids=lambda path: path.name, scope="module")
def recorded(request):
    return load(request.param)


@cache
def load(folder: Path):
    """(folder, model, recorded tensors, recorded facts)"""
    model, _ = convert_checkpoint(folder / "model_final.pth")
    return folder, model, load_file(folder / "expected.safetensors"), json.loads((folder / "expected.json").read_text())


def pixel_mask(tensors):
    return (~tensors["pixel_padding_mask"]).long()


def difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item() if a.numel() else 0.0


def test_every_stage(recorded):
    """As `--expected` compares them, and what no output shows."""
    folder, model, tensors, _ = recorded
    table = compare_with_recorded(model, folder / "expected.safetensors", TOLERANCE)
    stages = {line.split()[0] for line in table.splitlines()[1:-1]}
    layers = model.config.decoder_layers
    assert {"encoder.memory", "two_stage.pred_logits", "pred_boxes", f"decoder.hidden_states.{layers - 1}"} <= stages

    seen = {}
    parts = {"levels": model.model.pixel_encoder.feature_levels, "queries": model.model.query_selection}
    handles = [
        part.register_forward_hook(lambda _, given, output, name=name: seen.update({name: output}))
        for name, part in parts.items()
    ]
    with torch.no_grad():
        model(tensors["pixel_values"], pixel_mask(tensors))
    for handle in handles:
        handle.remove()
    for i, level in enumerate(reversed(seen["levels"])):
        assert difference(level, tensors[f"srcs.{i}"]) < TOLERANCE
    lengths = tensors["spatial_shapes"].prod(1).tolist()
    fine_to_coarse = torch.cat(torch.arange(sum(lengths)).split(lengths[::-1])[::-1])
    position = fine_to_coarse.argsort()  # of each of our tokens among the original's
    assert torch.equal(position[seen["queries"].tokens], tensors["two_stage.topk_tokens"])


def test_pixels_and_results(recorded):
    folder, model, tensors, facts = recorded
    processor = ProScaleDinoImageProcessorPil(do_resize=False)
    inputs = processor([Image.open(folder / f"image_{i}.png") for i in range(2)], return_tensors="pt")
    assert difference(inputs["pixel_values"], tensors["pixel_values"]) < 1e-6
    assert torch.equal(inputs["pixel_mask"], pixel_mask(tensors))
    with torch.no_grad():
        output = model(**inputs)
    for i, target_size in enumerate(facts["target_sizes"]):
        height, width = target_size
        expected = {name: tensors[f"post_processed.{i}.{name}"] for name in ("scores", "labels", "boxes")}
        results = best_detections(
            output.logits[i : i + 1], output.pred_boxes[i : i + 1], [target_size], 0.0, len(expected["scores"])
        )[0]
        assert torch.equal(results["labels"], expected["labels"])
        assert difference(results["scores"], expected["scores"]) < TOLERANCE
        in_image = expected["boxes"].clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        assert difference(results["boxes"], in_image) < PIXELS


def test_an_image_alone(recorded):
    """With padding kept out, a converted model gives in a batch what the original gives for the image alone."""
    _, model, tensors, facts = recorded
    height, width = facts["image_sizes"][1]
    alone = {name: tensors[f"image_1_alone.{name}"] for name in ("pred_logits", "pred_boxes")}
    with torch.no_grad():
        output = model(tensors["pixel_values"][1:, :, :height, :width])
        assert difference(output.logits, alone["pred_logits"]) < TOLERANCE
        assert difference(output.pred_boxes, alone["pred_boxes"]) * max(height, width) < PIXELS
        own = type(model)(type(model.config).from_dict({**model.config.to_dict(), "batch_padding": "per_image"})).eval()
        own.load_state_dict(model.state_dict())
        output = own(tensors["pixel_values"], pixel_mask(tensors))
    assert difference(output.logits[1:], alone["pred_logits"]) < TOLERANCE
    assert difference(output.pred_boxes[1:], alone["pred_boxes"]) * max(height, width) < PIXELS


@pytest.mark.parametrize("name", ["train", "train_one_image_empty"])
def test_training(recorded, name):
    """Denoising with the recorded draws, matching, losses, and gradients, which show that boxes look forward twice."""
    _, model, tensors, facts = recorded
    given, expected = (
        {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")},
        facts[name],
    )
    labels = [
        {"class_labels": given[f"targets.{i}.labels"], "boxes": given[f"targets.{i}.boxes"]}
        for i in range(len(tensors["pixel_values"]))
    ]
    denoising = model.model.denoising
    seen = {}
    handles = [
        denoising.register_forward_hook(lambda _, arguments, output: seen.update(queries=output)),
        model.criterion.register_forward_hook(lambda _, arguments, output: seen.update(given=arguments)),
    ]
    match, draw = model.criterion.match, denoising.draw
    model.criterion.match = lambda *arguments: seen.setdefault("matches", match(*arguments))
    denoising.draw = lambda queries, device: recorded_noise(given, denoising.label_noise_ratio)
    try:
        model.train().zero_grad()
        output = model(tensors["pixel_values"], pixel_mask(tensors), labels)
        output.loss.backward()
    finally:
        del model.criterion.match, denoising.draw
        model.eval()
        for handle in handles:
            handle.remove()
    assert (match, draw) == (model.criterion.match, denoising.draw)

    check_denoising(seen, given, expected)
    check_matching(seen["matches"], expected["matching"], model.config.decoder_layers)
    for term, value in output.loss_dict.items():
        assert value.item() == pytest.approx(expected["losses_unweighted"][term], rel=1e-5, abs=1e-6), term
    assert output.loss_dict.keys() == expected["loss_weights"].keys()
    assert output.loss.item() == pytest.approx(expected["total_weighted_loss"], rel=1e-5)
    for source, norm in expected.get("gradient_norms", {}).items():
        assert gradient_norm(model, source) == pytest.approx(norm or 0, rel=TOLERANCE, abs=1e-6), source
    for source, gradient in given.items():
        if source.startswith("gradient."):
            check_gradient(model, source.removeprefix("gradient."), gradient)


def recorded_noise(given, label_noise_ratio):
    chance = given["denoising.draw.label_uniform"]
    new_labels = torch.zeros(len(chance), dtype=torch.int64)
    new_labels[chance < label_noise_ratio / 2] = given["denoising.draw.new_labels"]
    sign = given["denoising.draw.box_sign"] * 2 - 1
    return Noise(chance, new_labels, sign, given["denoising.draw.box_uniform"])


def check_denoising(seen, given, expected):
    queries = seen["queries"]
    assert queries.targets.groups == expected["dn_meta"]["num_dn_group"]
    assert queries.content.shape[1] == expected["dn_meta"]["pad_size"]
    assert difference(queries.box_logits, given["denoising.input_query_bbox_unsigmoid"]) < TOLERANCE
    mask = ~attention_between(queries.group, len(given["denoising.attention_mask"]) - queries.content.shape[1])
    assert torch.equal(mask, given["denoising.attention_mask"])
    detections = seen["given"][4]
    for layer, (logits, boxes) in enumerate(zip(*detections, strict=True)):
        prefix = f"denoising.aux.{layer}" if layer < len(detections.logits) - 1 else "denoising"
        for name, tensor in (("pred_logits", logits), ("pred_boxes", boxes)):
            assert difference(tensor, given.get(f"{prefix}.{name}", tensor)) < TOLERANCE  # not all are recorded


def check_matching(matches, expected, layers):
    names = ["two_stage", *(f"aux.{i}" for i in range(layers - 1)), "last"]
    for image, triples in enumerate(matches):
        for prediction, name in enumerate(names):
            _, queries, objects = triples[:, triples[0] == prediction]
            assert {"queries": queries.tolist(), "targets": objects.tolist()} == expected[name][image], name


def ours(source, levels):
    """Our names of one of the original's parameters, whose first copy is named."""
    source = re.sub(r"^transformer\.decoder\.((bbox|class)_embed\.0\.)", r"\1", source)
    [name] = coarse_to_fine({source: torch.zeros(1)}, levels, heads=1)
    return target_names(name)


def gradient_norm(model, source):
    parameters = dict(model.named_parameters())
    gradients = [parameters[name].grad for name in ours(source, model.config.num_feature_levels)]
    assert gradients, source
    if any(gradient is None for gradient in gradients):  # frozen
        return 0.0
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))


def check_gradient(model, source, expected):
    config = model.config
    parameters = dict(model.named_parameters())
    gradient = torch.cat([parameters[name].grad for name in ours(source, config.num_feature_levels)])
    if source == "label_enc.weight":  # has rows for classes that are never used
        assert not expected[len(gradient) :].any()
        expected = expected[: len(gradient)]
    [flipped] = coarse_to_fine({source: expected}, config.num_feature_levels, config.num_attention_heads).values()
    # as vectors: a ReLU's input that is nearly 0 may have the other sign in another version of PyTorch
    assert (gradient - flipped).norm() < TOLERANCE * max(1, expected.norm().item()), source
