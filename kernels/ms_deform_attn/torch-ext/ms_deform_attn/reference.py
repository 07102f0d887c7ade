"""Multi-scale deformable attention in plain PyTorch: what the compiled code is tested against, and what runs where
there is none: other devices, float64, head sizes that are no multiple of 8."""

import torch
from torch.nn import functional


def ms_deform_attn(
    value: torch.Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """Arguments and result as in [`operators.ms_deform_attn`], in any floating-point type."""
    batch, _, heads, head_dim = value.shape
    queries = sampling_locations.shape[1]
    accumulate = torch.promote_types(value.dtype, torch.float32)
    locations = sampling_locations.to(torch.promote_types(sampling_locations.dtype, torch.float32))
    # A point far outside has no gradient either.
    locations = torch.where(locations.isfinite().all(-1, keepdim=True), locations, -2.0)
    levels = value.split([height * width for height, width in spatial_shapes], dim=1)
    output = value.new_zeros((batch * heads, head_dim, queries), dtype=accumulate)
    for level, ((height, width), tokens) in enumerate(zip(spatial_shapes, levels, strict=True)):
        maps = tokens.to(accumulate).permute(0, 2, 3, 1).reshape(batch * heads, head_dim, height, width)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1  # (batch * heads, queries, points, 2)
        weights = attention_weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        samples = functional.grid_sample(maps, grid.to(accumulate), padding_mode="zeros", align_corners=False)
        output = output + (samples * weights).sum(-1)  # sum over points
    # (batch * heads, head_dim, queries) -> (batch, queries, heads * head_dim)
    return output.view(batch, heads * head_dim, queries).transpose(1, 2).to(value.dtype).contiguous()


def fused_ms_deform_attn(
    value: torch.Tensor,
    spatial_shapes: list[tuple[int, int]],
    reference_points: torch.Tensor,
    sampling_offsets: torch.Tensor,
    attention_logits: torch.Tensor,
) -> torch.Tensor:
    """Arguments and result as in [`operators.fused_ms_deform_attn`], in any floating-point type."""
    weights = attention_logits.softmax(-1, dtype=torch.promote_types(attention_logits.dtype, torch.float32))
    if reference_points.shape[-1] == 4:  # boxes
        # An offset that is not finite leads nowhere, and has no part in the gradient of the box's size.
        finite = sampling_offsets.isfinite()
        steps = torch.where(finite, sampling_offsets, 0) / sampling_offsets.shape[4]
        offsets = torch.where(finite, steps * reference_points[:, :, None, :, None, 2:] / 2, torch.nan)
    else:
        map_sizes = reference_points.new_tensor([(width, height) for height, width in spatial_shapes])
        offsets = sampling_offsets / map_sizes[:, None]
    locations = reference_points[:, :, None, :, None, :2] + offsets
    return ms_deform_attn(value, spatial_shapes, locations, weights.view(sampling_offsets.shape[:-1]))
