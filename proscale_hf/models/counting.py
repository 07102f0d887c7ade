"""Counts multiply-adds and activations, in the convention of the papers' tables.

The tables of PRO-SCALE and Mask2Former were made with fvcore: a multiply-add counts 1, normalisation, resizing and
sampling count by estimates, the rest counts nothing. The same is done here on the meta device, with shapes only. That
takes no memory, and does not depend on the attention kernels in use.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import PreTrainedConfig, PreTrainedModel

from proscale_hf.layers.ms_deform_attn import MultiScaleDeformableAttention


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
    What one image costs a segmentation model. A GFLOP is 10^9 multiply-adds, as in the papers.

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

    @property
    def stages(self) -> dict[str, float]:
        """GFLOPs of the stages by their names in the papers; they add up to the total."""
        return {
            "backbone": self.backbone_gflops,
            "encoder (pixel decoder)": self.encoder_gflops,
            "mask decoder": self.mask_decoder_gflops,
            "post-processing": self.post_processing_gflops,
        }


def remembered(count_config: Callable[[type[PreTrainedModel], PreTrainedConfig, int, int], Any]) -> Callable:
    """
    Lets a family's `measure_cost` refuse impossible sizes, and remember what it found for equal configurations.

    Args:
        count_config: takes the model's class, a configuration of its own to change, height and width in pixels.
    """

    @functools.lru_cache(maxsize=256)
    def cached(model_class: type, config_class: type, config_json: str, height: int, width: int) -> Any:
        return count_config(model_class, config_class.from_dict(json.loads(config_json)), height, width)

    @functools.wraps(count_config)
    def measure(model_class: type[PreTrainedModel], config: PreTrainedConfig, height: int, width: int) -> Any:
        check_size(height, width)
        return cached(model_class, type(config), config.to_json_string(), height, width)

    measure.cached = cached
    return measure


def check_size(height: int, width: int) -> None:
    """Raises a ValueError unless an image can have this size."""
    if min(height, width) < 1:
        raise ValueError(f"`height` and `width` must be at least 1, got {height} x {width}.")


def shapes_only(
    model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> tuple[PreTrainedModel, "CountedSampling"]:
    """A model without memory for its weights, and what counts in place of its deformable attention's operation."""
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=torch.float32)
    sampling = CountedSampling()
    for module in model.modules():
        if isinstance(module, MultiScaleDeformableAttention):
            module.forward = sampling
    return model.eval().requires_grad_(False), sampling  # the counter stumbles over views of what needs gradients


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


def count(run: Callable[[], Any], costs: Mapping[Any, Callable] = OPERATION_COSTS) -> tuple[Any, int]:
    """What `run` returns, and its multiply-adds; with other `costs` than the usual ones if they are given."""
    counter = FlopCounterMode(display=False, custom_mapping=dict(costs))
    with torch.no_grad(), counter:
        result = run()
    return result, counter.get_total_flops() // 2
