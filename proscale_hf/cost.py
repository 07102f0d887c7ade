"""What one image costs: multiply-adds by stage, parameters and activations, in the convention of the papers' tables.

The tables of PRO-SCALE and Mask2Former were made with fvcore: a multiply-add counts 1, normalisation, resizing and
sampling count by estimates, the rest counts nothing. The same is done here on the meta device, with shapes only. That
takes no memory, and does not depend on the attention kernels in use.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from proscale_hf.layers.ms_deform_attn import MultiScaleDeformableAttention
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig
from proscale_hf.models.mask2former.mask_decoder import predict_masks
from proscale_hf.models.mask2former.modeling_proscale_mask2former import (
    ProScaleMask2FormerForUniversalSegmentation,
    ProScaleMask2FormerPreTrainedModel,
)


NORM = 5  # estimate for an element
BATCH_NORM = 2  # for an element, with stored statistics
BILINEAR = 4  # for a sampled value
NEAREST = 1


def _by_input(cost: int) -> Callable[..., int]:
    return lambda input_shape, *_, **__: 2 * cost * torch.Size(input_shape).numel()


def _by_output(cost: int) -> Callable[..., int]:
    return lambda *_, out_shape, **__: 2 * cost * torch.Size(out_shape).numel()


# What PyTorch's own counter leaves out; it counts 2 for a multiply-add.
OPERATION_COSTS = {
    torch.ops.aten.native_layer_norm: _by_input(NORM),
    torch.ops.aten.native_group_norm: _by_input(NORM),
    torch.ops.aten.native_batch_norm: _by_input(BATCH_NORM),
    torch.ops.aten.upsample_bilinear2d: _by_output(BILINEAR),
    torch.ops.aten.upsample_nearest2d: _by_output(NEAREST),
}
OPERATION_COSTS |= {  # or PyTorch 2.8 takes some of them apart, uncounted
    operation.default: cost for operation, cost in OPERATION_COSTS.items()
}
ACTIVATIONS = dict.fromkeys(flop_registry, _by_output(1))  # all it knows are convolutions and matrix products


@dataclass(frozen=True)
class Cost:
    """
    What one image costs. A GFLOP is 10^9 multiply-adds, as in the papers.

    Attributes:
        total_gflops: all stages and post-processing.
        backbone_gflops: the backbone.
        encoder_gflops: the pixel decoder; "encoder" is the PRO-SCALE paper's word.
        mask_decoder_gflops: the mask decoder with its heads, as the original computes it and fvcore sees it: every
            prediction has masks at the resolution of the per-pixel embedding, and the product of queries and keys in
            masked attention goes unseen.
        post_processing_gflops: masks resized to the padded image, then to the image, and added up by class.
        forward_gflops: what a forward pass takes here, without post-processing. All products count, and masks that
            only steer attention are made at the resolution of the map they are for.
        parameters_millions: parameters, in millions.
        activations_millions: numbers that convolutions and matrix products put out in a forward pass here, in millions,
            as fvcore counts them. Not the memory in use at one time: inference frees most of them at once.
    """

    total_gflops: float
    backbone_gflops: float
    encoder_gflops: float
    mask_decoder_gflops: float
    post_processing_gflops: float
    forward_gflops: float
    parameters_millions: float
    activations_millions: float


def measure_cost(
    config_or_model: ProScaleMask2FormerConfig | ProScaleMask2FormerPreTrainedModel, height: int, width: int
) -> Cost:
    """
    Count what the segmentation model takes for one image. It takes about half a second, and is remembered.

    Args:
        config_or_model: a configuration, or a model, whose configuration is taken.
        height: of the image as the model gets it, in pixels; padding to a multiple of the largest stride is added.
        width: as `height`.

    Raises:
        ValueError: `height` or `width` is not at least 1.
    """
    if min(height, width) < 1:
        raise ValueError(f"`height` and `width` must be at least 1, got {height} x {width}.")
    config = getattr(config_or_model, "config", config_or_model)
    return _measure(type(config), config.to_json_string(), height, width)


@functools.lru_cache(maxsize=256)
def _measure(config_class: type[ProScaleMask2FormerConfig], config_json: str, height: int, width: int) -> Cost:
    config = config_class.from_dict(json.loads(config_json))
    segmenter, sampling = _shapes_only(config)
    model = segmenter.model
    stride = config.feature_strides[-1]
    padded_height, padded_width = -(-height // stride) * stride, -(-width // stride) * stride
    pixel_values = torch.empty((1, config.backbone_config.num_channels, padded_height, padded_width), device="meta")

    activations = FlopCounterMode(display=False, custom_mapping=ACTIVATIONS)
    with activations:
        maps, backbone = _count(lambda: tuple(model.pixel_level_module.encoder(pixel_values).feature_maps))
        pixels, pixel_decoder = _count(lambda: model.pixel_level_module.decoder(maps))
        features, mask_features = pixels.multi_scale_features, pixels.mask_features
        decoded, layers = _count(lambda: model.transformer_module(features, mask_features))
        _, classes_once = _count(lambda: segmenter.class_predictor(decoded.query_states[-1]))
        _, masks_once = _count(lambda: predict_masks(decoded.mask_embeddings[-1], mask_features))
    pixel_decoder += sampling.cost

    tokens = [feature_map.shape[-2:].numel() for feature_map in features]
    mask_decoder = _as_in_the_original(config, tokens, layers) + config.decoder_layers * (classes_once + masks_once)
    resizing = BILINEAR * config.num_queries * (padded_height * padded_width + height * width)
    post_processing = resizing + config.num_queries * config.num_labels * height * width
    return Cost(
        total_gflops=(backbone + pixel_decoder + mask_decoder + post_processing) / 1e9,
        backbone_gflops=backbone / 1e9,
        encoder_gflops=pixel_decoder / 1e9,
        mask_decoder_gflops=mask_decoder / 1e9,
        post_processing_gflops=post_processing / 1e9,
        forward_gflops=(backbone + pixel_decoder + layers + classes_once + masks_once) / 1e9,
        parameters_millions=segmenter.num_parameters() / 1e6,
        activations_millions=activations.get_total_flops() // 2 / 1e6,
    )


def _as_in_the_original(config: ProScaleMask2FormerConfig, tokens: list[int], layers: int) -> int:
    """
    Args:
        config: the model's configuration.
        tokens: positions of each map, coarse to fine; the layers read them in turns.
        layers: what the mask decoder takes here, without its predictions.

    Returns:
        What fvcore sees of it in the original. There, masks that steer attention are made from predictions at full
        resolution, the last one included, and resized.
    """
    tokens_read = [tokens[layer % len(tokens)] for layer in range(config.decoder_layers - 1)]
    next_tokens = tokens[(config.decoder_layers - 1) % len(tokens)]
    steering_here = config.mask_feature_size * (config.num_queries * sum(tokens_read) + BILINEAR * sum(tokens))
    steering_there = BILINEAR * config.num_queries * (sum(tokens_read) + next_tokens)
    unseen_products = config.num_queries * config.hidden_dim * sum(tokens_read)
    return layers - steering_here + steering_there - unseen_products


def _shapes_only(
    config: ProScaleMask2FormerConfig,
) -> tuple[ProScaleMask2FormerForUniversalSegmentation, "CountedSampling"]:
    """A model without memory for its weights, and what counts in place of its deformable attention's operation."""
    with torch.device("meta"):
        segmenter = ProScaleMask2FormerForUniversalSegmentation._from_config(config, dtype=torch.float32)
    sampling = CountedSampling()
    for module in segmenter.modules():
        if isinstance(module, MultiScaleDeformableAttention):
            module.forward = sampling
    return segmenter.eval().requires_grad_(False), sampling  # the counter stumbles over views of what needs gradients


class CountedSampling:
    """Stands in for [`MultiScaleDeformableAttention`]: adds up the cost, and computes nothing."""

    def __init__(self):
        self.cost = 0

    def __call__(
        self,
        value: torch.Tensor,
        value_spatial_shapes: torch.Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: torch.Tensor,
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
        im2col_step: int,
    ) -> torch.Tensor:
        """Arguments and shape of the result as those of the operation."""
        batch, _, heads, head_dim = value.shape
        self.cost += BILINEAR * head_dim * attention_weights.numel()
        return value.new_empty((batch, sampling_locations.shape[1], heads * head_dim))


def _count(run: Callable[[], Any]) -> tuple[Any, int]:
    """What `run` returns, and its multiply-adds."""
    counter = FlopCounterMode(display=False, custom_mapping=OPERATION_COSTS)
    with torch.no_grad(), counter:
        result = run()
    return result, counter.get_total_flops() // 2
