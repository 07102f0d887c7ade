"""Costs against the original's, which were counted with fvcore on the original code (random weights)."""

from typing import Any

import pytest
import torch
from torch import nn

import proscale_hf.layers.ms_deform_attn as ms_deform_attn
from helpers import FOUR_LEVELS, TINY_RESNET, pixels, tiny_config, tiny_model
from proscale_hf import ProScaleDinoConfig, ProScaleMask2FormerConfig
from proscale_hf.backbones.presets import SWIN_TINY
from proscale_hf.cost import measure_cost
from proscale_hf.encoders.choice import ENCODER_CLASSES
from proscale_hf.models.mask2former.cost import measure_cost as measure_segmenter


RESNET50 = {
    "model_type": "resnet",
    "depths": [3, 4, 6, 3],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
RESNET101 = {**RESNET50, "depths": [3, 4, 23, 3]}
MASK2FORMER = {"encoder": "mask2former", "pixel_embedding": "conv", "token_recalibration": "none"}
COCO, CITYSCAPES = (800, 1067, 133), (1024, 2048, 19)
TOLERANCE = 0.005
LITE = {"encoder": "lite", "pixel_embedding": "conv"}
LITE_LPE = {"encoder": "lite", "pixel_embedding": "maxpool"}
RT = {
    "encoder": "rt",
    "pixel_embedding": "none",
    "common_stride": 8,
    "feature_strides": (8, 16, 32),
    "backbone_config": {**SWIN_TINY, "out_features": ["stage2", "stage3", "stage4"]},
}
# The paper's COCO totals are averages, which 800 x 1067 stands for. Its COCO figures for these encoders come from an
# image of 3:2, see docs/method.md.
COCO_OF_ENCODERS = (800, 1200, 133)

# backbone (None is Swin-T), stages (None is Mask2Former), input, GFLOPs: total, pixel decoder, backbone, mask decoder
STAGE_COSTS = [
    (None, None, COCO, 235.28, 118.00, 81.30, 23.88),
    (None, (3, 3, 3), COCO, 174.24, 56.95, 81.30, 23.88),
    (None, (1, 1, 1), COCO, 140.43, 23.14, 81.30, 23.88),
    (None, None, CITYSCAPES, 541.02, 284.30, 195.55, 55.37),
    (None, (3, 3, 3), CITYSCAPES, 393.93, 137.21, 195.55, 55.37),
    (None, (1, 1, 1), CITYSCAPES, 312.48, 55.76, 195.55, 55.37),
    (RESNET50, None, CITYSCAPES, 527.28, 294.37, 171.75, 55.37),
    (RESNET50, (3, 3, 3), CITYSCAPES, 380.19, 147.28, 171.75, 55.37),
    (RESNET101, (3, 3, 3), CITYSCAPES, 535.78, 147.28, 327.34, 55.37),
]
# at 800 x 1333 with 133 classes: total GFLOPs, parameters in millions
TOTALS = [
    (None, None, 289.56, 47.44),
    (None, (1, 1, 1), 172.39, 44.58),
    (None, (3, 1, 1), 173.83, 45.94),
    (None, (1, 3, 1), 179.90, 45.99),
    (None, (1, 1, 3), 205.20, 46.04),
    (None, (2, 2, 2), 193.27, 46.70),
    (None, (3, 3, 3), 214.15, 48.82),
    (RESNET50, None, 283.23, 43.98),
    (RESNET50, (1, 1, 1), 166.06, 41.12),
    (RESNET50, (1, 1, 3), 198.87, 42.59),
    (RESNET50, (2, 2, 2), 186.94, 43.25),
    (RESNET50, (3, 3, 3), 207.82, 45.37),
]


# settings, input, the paper's total and encoder, None where it is for another input
BASELINES = [
    (LITE, COCO, 188.00, None),
    (LITE, COCO_OF_ENCODERS, None, 79.78),
    (LITE, CITYSCAPES, 428.70, 172.00),
    (LITE_LPE, COCO, 154.60, None),
    (LITE_LPE, COCO_OF_ENCODERS, None, 43.92),
    (LITE_LPE, CITYSCAPES, 351.40, 94.69),
    (RT, COCO, 158.30, None),
    (RT, COCO_OF_ENCODERS, None, 59.66),
    (RT, CITYSCAPES, 361.10, 130.00),
]


def make_config(backbone: dict | None, stages: tuple | None, num_labels: int) -> ProScaleMask2FormerConfig:
    settings: dict[str, Any] = MASK2FORMER if stages is None else {"encoder_stage_layers": stages}
    return ProScaleMask2FormerConfig(
        backbone_config=None if backbone is None else dict(backbone), num_labels=num_labels, **settings
    )


@pytest.mark.parametrize(("backbone", "stages", "image", "total", "encoder", "backbone_cost", "mask"), STAGE_COSTS)
def test_stages_cost_what_they_do_in_the_original(backbone, stages, image, total, encoder, backbone_cost, mask):
    height, width, num_labels = image
    cost = measure_cost(make_config(backbone, stages, num_labels), height, width)
    assert cost.total_gflops == pytest.approx(total, rel=TOLERANCE)
    assert cost.encoder_gflops == pytest.approx(encoder, rel=TOLERANCE)
    assert cost.backbone_gflops == pytest.approx(backbone_cost, rel=TOLERANCE)
    assert cost.mask_decoder_gflops == pytest.approx(mask, rel=TOLERANCE)
    stages = cost.backbone_gflops + cost.encoder_gflops + cost.mask_decoder_gflops + cost.post_processing_gflops
    assert cost.total_gflops == pytest.approx(stages)


@pytest.mark.parametrize(("settings", "image", "total", "encoder"), BASELINES)
def test_the_papers_baselines_cost_what_its_tables_say(settings, image, total, encoder):
    height, width, num_labels = image
    cost = measure_cost(ProScaleMask2FormerConfig(num_labels=num_labels, **settings), height, width)
    assert total is None or cost.total_gflops == pytest.approx(total, rel=0.02)
    assert encoder is None or cost.encoder_gflops == pytest.approx(encoder, rel=0.02)


def test_products_of_attention_in_a_map_count():
    """As fvcore sees them where nothing is masked: queries and keys, weights and values."""
    small, large = (measure_cost(tiny_config(encoder="rt"), *size).encoder_gflops for size in ((64, 64), (64, 128)))
    quadratic = 2 * 32 * (8**2 - 2 * 4**2) / 1e9  # all but the products grows with the number of tokens
    assert large - 2 * small == pytest.approx(quadratic, rel=1e-6)


@pytest.mark.parametrize(("backbone", "stages", "total", "parameters"), TOTALS)
def test_totals_and_parameters_of_the_original(backbone, stages, total, parameters):
    cost = measure_cost(make_config(backbone, stages, 133), 800, 1333)
    assert cost.total_gflops == pytest.approx(total, rel=TOLERANCE)
    assert cost.parameters_millions == pytest.approx(parameters, rel=TOLERANCE)


def test_the_kernel_in_use_makes_no_difference(monkeypatch):
    expected = measure_cost(tiny_config(), 64, 96)

    def compiled(*_: Any) -> torch.Tensor:
        raise AssertionError("a compiled kernel cannot run without data")

    monkeypatch.setattr(ms_deform_attn.MultiScaleDeformableAttention, "forward", compiled)
    measure_segmenter.cached.cache_clear()
    assert measure_cost(tiny_config(), 64, 96) == expected


def test_a_forward_pass_costs_less_than_the_original_counts():
    """Masks that only steer attention are smaller here; products of queries and keys, which fvcore misses, count."""
    cost = measure_cost(make_config(None, (3, 3, 3), 133), 800, 1067)
    tokens = 25 * 34 + 50 * 68 + 100 * 136
    steering = 3 * 100 * 256 * tokens + 4 * 256 * tokens
    in_the_original = 9 * 100 * 256 * 200 * 272 + 9 * 100 * 256 * 134 + 4 * 100 * (3 * tokens + 25 * 34)
    query_key_products = 3 * 100 * 256 * tokens
    expected = cost.total_gflops - cost.post_processing_gflops
    expected += (steering + query_key_products - in_the_original) / 1e9
    assert cost.forward_gflops == pytest.approx(expected, rel=1e-9)


def test_every_weight_of_a_model_counts_once():
    model = tiny_model(backbone_config=dict(TINY_RESNET))
    assert measure_cost(model, 64, 64).parameters_millions == sum(p.numel() for p in model.parameters()) / 1e6


def test_any_number_of_levels():
    """A layer of the last stage costs what its tokens cost: queries, values, samples and the feed-forward block."""
    smaller, larger = (
        measure_cost(tiny_config(**{**FOUR_LEVELS, "encoder_stage_layers": (3, 3, 3, last)}), 128, 192)
        for last in (2, 3)
    )
    tokens, samples = 2 * 3 + 4 * 6 + 8 * 12 + 16 * 24, 4 * 4 * 4  # heads, levels, points
    products = 64 * (2 * samples + samples + 64 + 64 + 2 * 48)  # offsets, weights, value, output, feed-forward
    expected = tokens * (products + 4 * 16 * samples + 2 * 5 * 64)  # bilinear samples of 16 channels, two norms
    assert (larger.encoder_gflops - smaller.encoder_gflops) * 1e9 == pytest.approx(expected, rel=1e-6)


def test_images_are_padded():
    assert measure_cost(tiny_config(), 33, 65).encoder_gflops == measure_cost(tiny_config(), 64, 96).encoder_gflops
    resized_to_padded, resized_and_added_up = 4 * 7 * 64 * 96, (4 * 7 + 7 * 4) * 33 * 65  # 7 queries, 4 classes
    expected = (resized_to_padded + resized_and_added_up) / 1e9
    assert measure_cost(tiny_config(), 33, 65).post_processing_gflops == pytest.approx(expected, rel=1e-9)


def test_measuring_leaves_everything_as_it_was():
    """In training a model is saved, and so measured, again and again."""
    model = tiny_model().train().to(torch.bfloat16)
    config, state = model.config.to_dict(), torch.get_rng_state()
    measure_cost(model, 64, 96)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == config and model.training and next(model.parameters()).requires_grad
    hits = measure_segmenter.cached.cache_info().hits
    measure_cost(model, 64, 96)
    assert measure_segmenter.cached.cache_info().hits == hits + 1


@pytest.mark.parametrize("size", [(0, 64), (64, -1)])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match="at least 1"):
        measure_cost(tiny_config(), *size)


def test_timm_backbones_can_be_measured():
    pytest.importorskip("timm")
    backbone = {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [1, 2, 3, 4]}
    config = tiny_config(backbone_config={**backbone, "features_only": True})
    assert measure_cost(config, 224, 224).backbone_gflops == pytest.approx(1.82, rel=0.01)  # as timm's tables say


@pytest.mark.parametrize("encoder", sorted(ENCODER_CLASSES))
def test_activations_are_what_layers_and_products_put_out(encoder):
    model = tiny_model(encoder=encoder, backbone_config=dict(TINY_RESNET))
    counted = 0

    def count(_: Any, __: Any, output: torch.Tensor) -> None:
        nonlocal counted
        counted += output.numel()

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(count)
    model(pixels(1, 64, 96))
    tokens, queries, heads = {32: 2 * 3, 16: 4 * 6, 8: 8 * 12}, 7, 4
    read = [tokens[stride] for stride in (32, 16, 8, 32)]  # by the mask decoder's four layers
    attention = 4 * (heads * queries * queries + queries * 32)  # among the queries: products and results
    attention += sum(heads * queries * number + queries * 32 for number in read)
    if encoder == "rt":
        attention += heads * 6 * 6 + 6 * 32
    projections = 32 * sum(queries + 2 * number for number in read)  # of masked attention, which are no layers
    masks = queries * (sum(read) + 16 * 24)
    expected = counted + attention + projections + masks
    assert measure_cost(model, 64, 96).activations_millions == expected / 1e6


@pytest.mark.parametrize("encoder", sorted(ENCODER_CLASSES))
def test_agrees_with_fvcore(encoder):
    """It sees all but the sampling of deformable attention."""
    fvcore = pytest.importorskip("fvcore.nn")
    model = tiny_model(encoder=encoder, backbone_config=dict(TINY_RESNET), attn_implementation="eager")
    cost = measure_cost(model, 64, 96)
    locations = {"proscale": 6 * 1 + 2 * 30 * 2 + 126 * 3, "mask2former": 2 * 126 * 3, "lite": (30 + 126) * 3, "rt": 0}
    sampling = 4 * 32 * 4 * locations[encoder]  # bilinear, channels, points
    flops = fvcore.FlopCountAnalysis(model, pixels(1, 64, 96)).unsupported_ops_warnings(False)
    activations = fvcore.ActivationCountAnalysis(model, pixels(1, 64, 96)).unsupported_ops_warnings(False)
    assert activations.total() == cost.activations_millions * 1e6
    assert cost.forward_gflops * 1e9 == pytest.approx(flops.total() + sampling, rel=1e-6)


@pytest.mark.parametrize(
    ("encoder", "total", "encoder_alone"), [("dino", 292.2, 172.9), ("proscale", 232.6, 113.4), ("lite", None, None)]
)
def test_detection_costs_what_fvcore_counts_of_the_original(encoder, total, encoder_alone):
    config = ProScaleDinoConfig(encoder=encoder, num_labels=91)
    cost = measure_cost(config, 800, 1333)
    assert sum(cost.stages.values()) == pytest.approx(cost.total_gflops)
    assert cost.forward_gflops < cost.total_gflops
    if total is not None:
        assert cost.total_gflops == pytest.approx(total, rel=0.005)
        assert cost.encoder_gflops == pytest.approx(encoder_alone, rel=0.005)
    if encoder == "dino":
        assert cost.parameters_millions == pytest.approx(46.9, abs=0.06)
