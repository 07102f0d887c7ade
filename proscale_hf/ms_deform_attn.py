"""Multi-scale deformable attention (https://arxiv.org/abs/2010.04159) and the encoder layer built on it.

Two layers can be replaced by compiled kernels from the Hub: `MultiScaleDeformableAttention`, under the name and
signature transformers uses, and around it `FusedMultiScaleDeformableAttention`, whose kernel computes softmax and
locations too. What stands here is the readable path in PyTorch: bilinear sampling is a weighted sum of rows of a
table, and the sum over all points of a query's head is one `embedding_bag`. Sampling locations and the accumulation are
float32 whatever the weights' type: in bfloat16 a location would be off by up to a pixel.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_proscale_mask2former import ProScaleMask2FormerConfig
from .deformable_attention_kernel import FUSED_LAYER, LAYER, replaceable
from .linear import Linear


IM2COL_STEP = 64  # images that a compiled kernel handles at once
CPU_TOKENS = 2048  # that are worked on at once, so that what is in between stays in the cache
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
            for locations, weights in zip(in_parts(sampling_locations), in_parts(attention_weights), strict=True)
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
    """[`MultiScaleDeformableAttention`] from what the projections give: offsets in pixels and attention logits."""

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
            reference_points: (1 or batch, queries, 1 or levels, 2) float32, (x, y) with 0 and 1 at the map's edges.
            sampling_offsets: (batch, queries, heads, levels, points, 2), (x, y) in pixels of the level.
            attention_logits: (batch, queries, heads, levels * points).

        Returns:
            (batch, queries, heads * head_dim), in the type of `value`.
        """
        weights = attention_logits.softmax(-1, dtype=torch.promote_types(attention_logits.dtype, torch.float32))
        offsets = sampling_offsets.to(reference_points.dtype) / value_spatial_shapes.flip(-1)[:, None]
        return self.attention(
            value,
            value_spatial_shapes,
            value_spatial_shapes_list,
            level_start_index,
            reference_points[:, :, None, :, None] + offsets,
            weights.view(sampling_offsets.shape[:-1]),
            IM2COL_STEP,
        )


class TokenGrid(NamedTuple):
    """Where the tokens of several maps lie, map after map.

    Attributes:
        shapes_list: (height, width) of each map, as Python integers.
        shapes: (levels, 2) int64, the same as a tensor.
        level_start_index: (levels,) int64, each map's first token.
        reference_points: (tokens, 2) float32, (x, y) of each token's centre in the unit square of its map.
    """

    shapes_list: list[tuple[int, int]]
    shapes: torch.Tensor
    level_start_index: torch.Tensor
    reference_points: torch.Tensor

    @classmethod
    def of_maps(cls, maps: list[torch.Tensor]) -> "TokenGrid":
        """The grid of (batch, channels, height, width) maps."""
        device = maps[0].device
        dtype = torch.promote_types(maps[0].dtype, torch.float32)
        shapes_list = [tuple(feature_map.shape[-2:]) for feature_map in maps]
        starts, centres = [0], []
        for height, width in shapes_list:
            starts.append(starts[-1] + height * width)
            y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
            x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
            y, x = torch.meshgrid(y, x, indexing="ij")
            centres.append(torch.stack((x, y), dim=-1).flatten(0, 1))  # (height * width, 2)
        return cls(
            shapes_list,
            torch.tensor(shapes_list, device=device),
            torch.tensor(starts[:-1], device=device),
            torch.cat(centres),
        )

    def first(self, levels: int) -> "TokenGrid":
        """The grid of the first `levels` maps alone."""
        tokens = sum(height * width for height, width in self.shapes_list[:levels])
        return TokenGrid(
            self.shapes_list[:levels],
            self.shapes[:levels],
            self.level_start_index[:levels],
            self.reference_points[:tokens],
        )


class DeformableSelfAttention(nn.Module):
    """The projections around [`MultiScaleDeformableAttention`]: tokens attend to a few points of each level.

    Args:
        embed_dim: channels of the tokens.
        num_heads: attention heads.
        num_levels: feature maps among the tokens.
        num_points: sampling points per head and level.
    """

    def __init__(self, embed_dim: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.sampling_offsets = SamplingOffsets(embed_dim, num_heads, num_levels, num_points)
        self.attention_weights = AttentionLogits(embed_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.attention = FusedMultiScaleDeformableAttention()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        grid: TokenGrid,
        num_queries: int | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (batch, tokens, channels).
            position_embeddings: (1, tokens, channels), added for the queries, not for the values.
            grid: where the tokens lie.
            num_queries: how many tokens attend, from the first one on; all by default. They attend to all tokens.

        Returns:
            (batch, num_queries, channels).
        """
        queries = hidden_states[:, :num_queries] + position_embeddings[:, :num_queries]
        per_query = (*queries.shape[:2], self.num_heads)
        output = self.attention(
            self.value_proj(hidden_states).unflatten(2, (self.num_heads, -1)),  # (batch, tokens, heads, head_dim)
            grid.shapes,
            grid.shapes_list,
            grid.level_start_index,
            grid.reference_points[None, :num_queries, None],
            self.sampling_offsets(queries).view(*per_query, self.num_levels, self.num_points, 2),
            self.attention_weights(queries).view(*per_query, self.num_levels * self.num_points),
        )
        return self.output_proj(output)


class SamplingOffsets(Linear):
    """Offsets in pixels for each head, level and point; at first each head looks along its own direction."""

    def __init__(self, embed_dim: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__(embed_dim, num_heads * num_levels * num_points * 2)
        self.shape = (num_heads, num_levels, num_points, 2)

    @torch.no_grad()
    def reset_parameters_to_ring(self) -> None:
        """No dependence on the token, and point p of head h at p + 1 pixels in the h-th of evenly spread directions."""
        num_heads, num_levels, num_points, _ = self.shape
        angles = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # onto the square of side 2
        distances = torch.arange(1, num_points + 1, dtype=torch.float32)
        ring = directions[:, None, None] * distances[:, None]  # (heads, 1, points, 2)
        init.zeros_(self.weight)
        init.copy_(self.bias, ring.expand(num_heads, num_levels, num_points, 2).reshape(-1))


class AttentionLogits(Linear):
    """Logits of the attention weights; zero at first, so that all points count alike."""


class DeformableEncoderLayer(GradientCheckpointingLayer):
    """Deformable self-attention and a feed-forward block, each followed by dropout, residual and layer norm.

    Args:
        config: the model's configuration.
        num_levels: feature maps among the tokens this layer gets.
    """

    def __init__(self, config: ProScaleMask2FormerConfig, num_levels: int):
        super().__init__()
        channels = config.feature_size
        self.self_attn = DeformableSelfAttention(
            channels, config.num_attention_heads, num_levels, config.encoder_num_points
        )
        self.self_attn_layer_norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, config.encoder_feedforward_dim)
        self.fc2 = nn.Linear(config.encoder_feedforward_dim, channels)
        self.final_layer_norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        grid: TokenGrid,
        num_queries: int | None = None,
    ) -> torch.Tensor:
        """Arguments and result as in [`DeformableSelfAttention.forward`]: of all tokens, those that attend return."""
        attended = self.self_attn(hidden_states, position_embeddings, grid, num_queries)
        parts = [
            self._transform(*part)
            for part in zip(in_parts(hidden_states[:, :num_queries]), in_parts(attended), strict=True)
        ]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _transform(self, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What follows attention, token by token."""
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attended))
        expanded = self.dropout(self.fc1(hidden_states).relu())
        return self.final_layer_norm(hidden_states + self.dropout(self.fc2(expanded)))


def in_parts(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cut (batch, tokens, ...) along the tokens, where that saves memory: on the CPU, and without gradients."""
    if tokens.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return (tokens,)
    return tokens.split(max(1, CPU_TOKENS // max(1, len(tokens))), dim=1)


def maps_to_tokens(maps: list[torch.Tensor]) -> torch.Tensor:
    """(batch, channels, height, width) maps -> (batch, tokens, channels), map after map."""
    return torch.cat([feature_map.flatten(2).transpose(1, 2) for feature_map in maps], dim=1)


def tokens_to_maps(tokens: torch.Tensor, spatial_shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """The inverse of [`maps_to_tokens`]."""
    parts = tokens.split([height * width for height, width in spatial_shapes], dim=1)
    return [
        part.unflatten(1, shape).movedim(-1, 1)  # (batch, channels, height, width)
        for part, shape in zip(parts, spatial_shapes, strict=True)
    ]
