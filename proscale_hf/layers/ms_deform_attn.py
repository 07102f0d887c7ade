"""Multi-scale deformable attention (https://arxiv.org/abs/2010.04159): the operation, and its fast path in PyTorch.

Compiled kernels from the Hub can replace two layers: `MultiScaleDeformableAttention`, under the name and signature
that transformers uses, and around it `FusedMultiScaleDeformableAttention`, whose kernel computes softmax and locations
too. The path here is written for speed: bilinear sampling is a weighted sum of rows of a table, and the sum over all
points of a query's head is one `embedding_bag`. The readable path, which a test compares with this one, is the kernel's
`reference.py`. Sampling locations and sums are float32 whatever the weights' type: in bfloat16 a location would be off
by up to a pixel.
"""

import torch
from torch import nn

from proscale_hf.layers.kernels import FUSED_LAYER, LAYER, replaceable


IM2COL_STEP = 64  # images that a compiled kernel handles at once
CPU_TOKENS = 2048  # how many are worked on at once, so that intermediate results stay in the cache
BORDER_BEFORE, BORDER_AFTER = 1, 2  # rows and columns of zeros around a map that bilinear sampling can touch


@replaceable(LAYER)
class MultiScaleDeformableAttention(nn.Module):
    """Sample values at given locations of several maps and add them up with given weights."""

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
        """
        Args:
            value: (batch, tokens, heads, head_dim), tokens of all levels one level after the other.
            value_spatial_shapes: (levels, 2) int64, (height, width) of each level.
            value_spatial_shapes_list: the same as Python integers.
            level_start_index: (levels,) int64, first token of each level; read by compiled kernels only.
            sampling_locations: (batch, queries, heads, levels, points, 2), (x, y) with 0 and 1 at the map's edges;
                what lies outside samples zeros.
            attention_weights: (batch, queries, heads, levels, points).
            im2col_step: images per block; read by compiled kernels only.

        Returns:
            (batch, queries, heads * head_dim), in the type of `value`.
        """
        accumulate = torch.promote_types(value.dtype, torch.float32)
        maps, shapes = with_zero_border(value.to(accumulate), value_spatial_shapes_list)
        lengths = [height * width for height, width in shapes]
        starts = value_spatial_shapes.new_tensor([sum(lengths[:level]) for level in range(len(lengths))])
        outputs = [
            sample_and_sum(maps, value_spatial_shapes, starts, locations.to(accumulate), weights.to(accumulate))
            for locations, weights in zip(token_parts(sampling_locations), token_parts(attention_weights), strict=True)
        ]
        return (torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]).to(value.dtype)


def sample_and_sum(
    maps: torch.Tensor,
    spatial_shapes: torch.Tensor,
    starts: torch.Tensor,
    locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """Each head of each token is a row of one table, and all that a query's head samples is one bag of rows.

    Args:
        maps: (batch, tokens, heads, head_dim), map after map, each with its border.
        spatial_shapes: (levels, 2) int64, (height, width) of each map without its border.
        starts: (levels,) int64, the first token of each map.
        locations: (batch, queries, heads, levels, points, 2), as in [`MultiScaleDeformableAttention.forward`].
        attention_weights: (batch, queries, heads, levels, points), of the maps' type as the locations.

    Returns:
        (batch, queries, heads * head_dim).
    """
    batch, tokens, heads, head_dim = maps.shape
    sizes = spatial_shapes.flip(-1)[:, None]  # (levels, 1, 2): width, height
    pixels = (locations * sizes - 0.5).clamp(min=-1).minimum(sizes)
    pixels = pixels.nan_to_num(nan=-1.0)  # outside, as in the compiled kernels
    corners = pixels.floor()
    right, lower = (pixels - corners).unbind(-1)  # (batch, queries, heads, levels, points) each
    left_weights, right_weights = attention_weights * (1 - right), attention_weights * right
    weights = torch.stack(
        (left_weights * (1 - lower), right_weights * (1 - lower), left_weights * lower, right_weights * lower), -1
    )

    x, y = (corners + BORDER_BEFORE).to(torch.int64).unbind(-1)
    widths = spatial_shapes[:, 1:] + BORDER_BEFORE + BORDER_AFTER  # (levels, 1)
    first_tokens = torch.arange(batch, device=maps.device)[:, None] * tokens + starts
    upper_left = first_tokens[:, None, None, :, None] + y * widths + x
    upper_left = upper_left * heads + torch.arange(heads, device=maps.device)[:, None, None]
    down = widths * heads
    rows = torch.stack((upper_left, upper_left + heads, upper_left + down, upper_left + down + heads), -1)
    output = nn.functional.embedding_bag(
        rows.flatten(3).flatten(0, 2),  # (batch * queries * heads, levels * points * 4)
        maps.flatten(0, 2),  # (batch * tokens * heads, head_dim)
        per_sample_weights=weights.flatten(3).flatten(0, 2),
        mode="sum",
    )
    return output.view(batch, -1, heads * head_dim)


def with_zero_border(
    value: torch.Tensor, spatial_shapes: list[tuple[int, int]]
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Surround each map by zeros, so that every point near it has four neighbours.

    Args:
        value: (batch, tokens, heads, head_dim), map after map.
        spatial_shapes: (height, width) of each map.

    Returns:
        (batch, more tokens, heads, head_dim), and the larger (height, width) of each map.
    """
    border = (0, 0, 0, 0, BORDER_BEFORE, BORDER_AFTER, BORDER_BEFORE, BORDER_AFTER)
    parts = value.split([height * width for height, width in spatial_shapes], dim=1)
    maps = [
        nn.functional.pad(part.unflatten(1, shape), border)  # (batch, height, width, heads, head_dim)
        for part, shape in zip(parts, spatial_shapes, strict=True)
    ]
    return torch.cat([level.flatten(1, 2) for level in maps], dim=1), [tuple(level.shape[1:3]) for level in maps]


@replaceable(FUSED_LAYER)
class FusedMultiScaleDeformableAttention(nn.Module):
    """[`MultiScaleDeformableAttention`] of what the projections give: offsets and attention logits."""

    def __init__(self):
        super().__init__()
        self.attention = MultiScaleDeformableAttention()

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
        """
        Args:
            value: (batch, tokens, heads, head_dim), tokens of all levels one level after the other.
            value_spatial_shapes: (levels, 2) int64, (height, width) of each level.
            value_spatial_shapes_list: the same as Python integers.
            level_start_index: (levels,) int64, first token of each level.
            reference_points: (1 or batch, queries, 1 or levels, 2 or 4) float32, points (x, y) or boxes (x and y of
                the centre, width, height), with 0 and 1 at the map's edges.
            sampling_offsets: (batch, queries, heads, levels, points, 2), (x, y). From a point, they are in pixels of
                the level. From a box, `points` of them make half its size: location = centre + offset / points *
                size / 2.
            attention_logits: (batch, queries, heads, levels * points).

        Returns:
            (batch, queries, heads * head_dim), in the type of `value`.

        Raises:
            ValueError: the references are neither points nor boxes.
        """
        if reference_points.shape[-1] not in (2, 4):
            raise ValueError(
                f"A reference must have 2 numbers (a point) or 4 (a box), not {reference_points.shape[-1]}."
            )
        weights = attention_logits.softmax(-1, dtype=torch.promote_types(attention_logits.dtype, torch.float32))
        offsets = sampling_offsets.to(reference_points.dtype)
        references = reference_points[:, :, None, :, None]  # (1 or batch, queries, 1, 1 or levels, 1, 2 or 4)
        if reference_points.shape[-1] == 4:
            offsets = offsets * (references[..., 2:] * (0.5 / offsets.shape[-2]))
        else:
            offsets = offsets / value_spatial_shapes.flip(-1)[:, None]
        return self.attention(
            value,
            value_spatial_shapes,
            value_spatial_shapes_list,
            level_start_index,
            references[..., :2] + offsets,
            weights.view(sampling_offsets.shape[:-1]),
            IM2COL_STEP,
        )


def token_parts(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cut (batch, tokens, ...) along the tokens where that saves memory: on the CPU, and without gradients."""
    if tokens.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return (tokens,)
    return tokens.split(max(1, CPU_TOKENS // max(1, len(tokens))), dim=1)
