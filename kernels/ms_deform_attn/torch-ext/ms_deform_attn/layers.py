"""Layers whose forward `kernels.kernelize` puts in the place of a model's own."""

import torch
from torch import nn

from .operators import fused_ms_deform_attn, ms_deform_attn


class MultiScaleDeformableAttention(nn.Module):
    """[`ms_deform_attn`] with the signature of transformers' layer of this name (Deformable DETR and others)."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        value: torch.Tensor,
        value_spatial_shapes: torch.Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: torch.Tensor,
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
        im2col_step: int,
    ) -> torch.Tensor:
        return ms_deform_attn(value, value_spatial_shapes_list, sampling_locations, attention_weights)


class FusedMultiScaleDeformableAttention(nn.Module):
    """[`fused_ms_deform_attn`] with the signature of PRO-SCALE's layer of this name."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        value: torch.Tensor,
        value_spatial_shapes: torch.Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: torch.Tensor,
        reference_points: torch.Tensor,
        sampling_offsets: torch.Tensor,
        attention_logits: torch.Tensor,
    ) -> torch.Tensor:
        return fused_ms_deform_attn(
            value, value_spatial_shapes_list, reference_points, sampling_offsets, attention_logits
        )
