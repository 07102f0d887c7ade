"""The tokens of several maps, deformable attention to them, and the encoder layer made of it."""

import itertools
import math
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from proscale_hf.layers.linear import Linear, ZeroLinear
from proscale_hf.layers.ms_deform_attn import FusedMultiScaleDeformableAttention, token_parts
from proscale_hf.layers.untouched import is_untouched, mark_as_built


class TokenGrid(NamedTuple):
    """Where the tokens of several maps lie, map after map.

    Attributes:
        shapes_list: (height, width) of each map, as Python integers.
        shapes: (levels, 2) int64, the same as a tensor.
        level_start_index: (levels,) int64, the first token of each map.
        centres: (1 or batch, tokens, 2) float32, (x, y) of each token's centre, with 0 and 1 at the edges of its image.
        reference_points: (1 or batch, tokens, 1 or levels, 2) float32, the same with 0 and 1 at the edges of the map
            that is looked at. Without padding, it is the same in all images and maps.
        padding: (batch, tokens) bool, True where a token lies in the padding of its image; None without padding.
        valid_ratios: (batch, levels, 2) float32, the shares of the maps' width and height that are image; None without
            padding.
    """

    shapes_list: list[tuple[int, int]]
    shapes: torch.Tensor
    level_start_index: torch.Tensor
    centres: torch.Tensor
    reference_points: torch.Tensor
    padding: torch.Tensor | None = None
    valid_ratios: torch.Tensor | None = None

    @classmethod
    def of_maps(cls, maps: list[torch.Tensor], padding: list[torch.Tensor] | None = None) -> "TokenGrid":
        """
        Args:
            maps: (batch, channels, height, width) each.
            padding: (batch, height, width) bool for each map, True in the padding of an image, which lies below and to
                the right of it.

        Returns:
            Their grid. With padding, a token keeps its place relative to the image when another map is looked at,
            although rounding pads each map by another share.
        """
        device = maps[0].device
        dtype = torch.promote_types(maps[0].dtype, torch.float32)
        shapes_list = [tuple(feature_map.shape[-2:]) for feature_map in maps]
        starts = [0, *itertools.accumulate(height * width for height, width in shapes_list)]
        shapes = torch.tensor(shapes_list, device=device)
        sizes = shapes[None] if padding is None else valid_sizes(padding)
        centres = torch.cat(
            [
                centres_of_cells(*shape, level_sizes, dtype)
                for shape, level_sizes in zip(shapes_list, sizes.unbind(1), strict=True)
            ],
            dim=1,
        )
        reference_points, token_padding, ratios = centres[:, :, None], None, None
        if padding is not None:
            ratios = (sizes.to(dtype) / shapes).flip(-1)
            reference_points = reference_points * ratios[:, None]
            token_padding = torch.cat([mask.flatten(1) for mask in padding], dim=1)
        return cls(
            shapes_list,
            shapes,
            torch.tensor(starts[:-1], device=device),
            centres,
            reference_points,
            token_padding,
            ratios,
        )

    def first(self, levels: int) -> "TokenGrid":
        """The grid of the first `levels` maps alone."""
        tokens = sum(height * width for height, width in self.shapes_list[:levels])
        return TokenGrid(
            self.shapes_list[:levels],
            self.shapes[:levels],
            self.level_start_index[:levels],
            self.centres[:, :tokens],
            self.reference_points[:, :tokens, :levels],
            None if self.padding is None else self.padding[:, :tokens],
            None if self.valid_ratios is None else self.valid_ratios[:, :levels],
        )


def valid_sizes(padding: list[torch.Tensor]) -> torch.Tensor:
    """
    What of each map is image.

    Args:
        padding: (batch, height, width) bool for each map, True in the padding, which lies below and to the right.

    Returns:
        (batch, levels, 2) int64, rows and columns, at least 1.
    """
    sizes = [torch.stack(((~mask[:, :, 0]).sum(1), (~mask[:, 0]).sum(1)), dim=-1) for mask in padding]
    return torch.stack(sizes, dim=1).clamp(min=1)


def centres_of_cells(height: int, width: int, sizes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Args:
        height: rows of a map.
        width: columns of the map.
        sizes: (1 or batch, 2) int64, rows and columns that are image.
        dtype: of the result.

    Returns:
        (1 or batch, height * width, 2), (x, y) of the cells' centres, with 0 and 1 at the edges of the image.
    """
    y = (torch.arange(height, device=sizes.device, dtype=dtype) + 0.5) / sizes[:, :1]  # (1 or batch, height)
    x = (torch.arange(width, device=sizes.device, dtype=dtype) + 0.5) / sizes[:, 1:]
    shape = (len(sizes), height, width)
    return torch.stack((x[:, None].expand(shape), y[:, :, None].expand(shape)), dim=-1).flatten(1, 2)


class DeformableAttention(nn.Module):
    """The projections around [`FusedMultiScaleDeformableAttention`]: queries attend to a few points of each map.

    Args:
        channels: of the queries and of the tokens.
        num_heads: attention heads.
        num_levels: maps among the tokens.
        num_points: sampling points per head and map.
    """

    def __init__(self, channels: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.sampling_offsets = SamplingOffsets(channels, num_heads, num_levels, num_points)
        self.attention_weights = AttentionLogits(channels, num_heads * num_levels * num_points)
        self.value_proj = Linear(channels, channels)
        self.output_proj = Linear(channels, channels)
        self.attention = FusedMultiScaleDeformableAttention()

    def forward(
        self, queries: torch.Tensor, values: torch.Tensor, grid: TokenGrid, reference_points: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            queries: (batch, queries, channels), position embeddings included.
            values: (batch, tokens, channels), without position embeddings. Tokens in the grid's padding count as 0.
            grid: where the tokens lie.
            reference_points: (1 or batch, queries, 1 or levels, 2 or 4) float32, the points (x, y) or boxes (x and y of
                the centre, width, height) around which each query looks, with 0 and 1 at the edges of a map.

        Returns:
            (batch, queries, channels).
        """
        values = self.value_proj(values)
        if grid.padding is not None:
            values = values.masked_fill(grid.padding[..., None], 0)
        per_query = (*queries.shape[:2], self.num_heads)
        output = self.attention(
            values.unflatten(2, (self.num_heads, -1)),  # (batch, tokens, heads, head_dim)
            grid.shapes,
            grid.shapes_list,
            grid.level_start_index,
            reference_points,
            self.sampling_offsets(queries).view(*per_query, self.num_levels, self.num_points, 2),
            self.attention_weights(queries).view(*per_query, self.num_levels * self.num_points),
        )
        return self.output_proj(output)


class SamplingOffsets(Linear):
    """Offsets for each head, map and point; at first each head looks along its own direction.

    Args:
        channels: of the queries.
        num_heads, num_levels, num_points: see [`DeformableAttention`].
    """

    def __init__(self, channels: int, num_heads: int, num_levels: int, num_points: int):
        self.shape = (num_heads, num_levels, num_points, 2)  # first, since nn.Linear resets its parameters itself
        super().__init__(channels, math.prod(self.shape))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """No dependence on the query, and point p of head h at p + 1 units in the h-th of evenly spread directions."""
        num_heads, _, num_points, _ = self.shape
        angles = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # onto the square of side 2
        distances = torch.arange(1, num_points + 1, dtype=torch.float32)
        ring = directions[:, None, None] * distances[:, None]  # (heads, 1, points, 2)
        init.zeros_(self.weight)
        init.copy_(self.bias, ring.expand(self.shape).reshape(-1))


class AttentionLogits(ZeroLinear):
    """Logits of the attention weights; zero at first, so that all points count alike."""


class DeformableEncoderLayer(GradientCheckpointingLayer):
    """Deformable self-attention and a feed-forward block, each followed by dropout, residual and layer norm.

    Args:
        channels: of the tokens.
        num_heads: attention heads.
        num_levels: maps among the tokens.
        num_points: sampling points per head and map.
        feedforward_dim: channels inside the feed-forward block.
        dropout: the probability with which a number is dropped in training.
    """

    def __init__(
        self, channels: int, num_heads: int, num_levels: int, num_points: int, feedforward_dim: int, dropout: float
    ):
        super().__init__()
        self.self_attn = DeformableAttention(channels, num_heads, num_levels, num_points)
        self.self_attn_layer_norm = nn.LayerNorm(channels)
        self.fc1 = Linear(channels, feedforward_dim)
        self.fc2 = Linear(feedforward_dim, channels)
        self.final_layer_norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        mark_as_built(self)

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
            position_embeddings: (1 or batch, tokens, channels), added for the queries, not for the values.
            grid: where the tokens lie; those in its padding are not attended to.
            num_queries: how many tokens attend, from the first one on; all by default. They attend to all tokens.

        Returns:
            (batch, num_queries, channels).
        """
        residual = hidden_states[:, :num_queries]
        queries = residual + position_embeddings[:, :num_queries]
        attended = self.self_attn(queries, hidden_states, grid, grid.reference_points[:, :num_queries])
        if not is_untouched(self.self_attn_layer_norm, self.fc1, self.fc2, self.final_layer_norm, self.dropout):
            return self._transform(residual, attended)
        parts = [self._transform(*part) for part in zip(token_parts(residual), token_parts(attended), strict=True)]
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
