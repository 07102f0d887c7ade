"""Tokens of several maps, deformable attention among them, and the encoder layer made of it."""

import math
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from proscale_hf.layers.linear import Linear
from proscale_hf.layers.ms_deform_attn import FusedMultiScaleDeformableAttention, in_parts
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig


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
        self.value_proj = Linear(embed_dim, embed_dim)
        self.output_proj = Linear(embed_dim, embed_dim)
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
        self.shape = (num_heads, num_levels, num_points, 2)
        super().__init__(embed_dim, num_heads * num_levels * num_points * 2)

    @torch.no_grad()
    def reset_parameters(self) -> None:
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

    def reset_parameters(self) -> None:
        """Zeros."""
        init.zeros_(self.weight)
        init.zeros_(self.bias)


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
        self.fc1 = Linear(channels, config.encoder_feedforward_dim)
        self.fc2 = Linear(config.encoder_feedforward_dim, channels)
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
