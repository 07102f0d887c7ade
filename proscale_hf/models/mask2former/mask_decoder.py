"""Masked-attention mask decoder of Mask2Former (https://arxiv.org/abs/2112.01527, section 3.2), as PRO-SCALE uses it.

Learned queries read the enhanced maps in turns, coarse to fine, each query only where its own last mask is. The mask
that steers the attention is computed at the map's own resolution: resizing the per-pixel embedding once and taking the
product there equals resizing the product.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from proscale_hf.layers.attention import SelfAttention, multi_head_attention
from proscale_hf.layers.linear import Linear, UniformLinear, linear, suits_onednn
from proscale_hf.layers.position_embedding import sine_position_embedding
from proscale_hf.layers.table import Table
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig
from proscale_hf.models.padding import mask_of_sizes


@dataclass
class MaskDecoderOutput(ModelOutput):
    """
    Attributes:
        query_states: the normalised queries behind each prediction, (batch, queries, channels) each, first to last.
        mask_embeddings: what gives each prediction's masks, (batch, queries, mask_feature_size) each.
        hidden_states: the queries before the first and after each layer, (batch, queries, channels) each.
        attentions: self-attention weights of each layer, (batch, heads, queries, queries).
        cross_attentions: cross-attention weights of each layer, (batch, heads, queries, tokens of the layer's map).
    """

    query_states: tuple[torch.Tensor, ...] | None = None
    mask_embeddings: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


class MaskDecoder(nn.Module):
    """Queries, and what prepares the maps for them.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ProScaleMask2FormerConfig):
        super().__init__()
        num_levels = len(config.encoder_strides)
        project = config.feature_size != config.hidden_dim or config.enforce_input_projection
        self.queries_embedder = Table(config.num_queries, config.hidden_dim)
        self.queries_features = Table(config.num_queries, config.hidden_dim)
        self.input_projections = nn.ModuleList(
            nn.Conv2d(config.feature_size, config.hidden_dim, kernel_size=1) if project else nn.Identity()
            for _ in range(num_levels)
        )
        self.level_embed = Table(num_levels, config.hidden_dim)
        self.decoder = MaskedAttentionDecoder(config)

    def forward(
        self,
        multi_scale_features: tuple[torch.Tensor, ...],
        mask_features: torch.Tensor,
        valid_sizes: list[torch.Tensor] | None = None,
        output_attentions: bool = False,
    ) -> MaskDecoderOutput:
        """
        Args:
            multi_scale_features: (batch, feature_size, height, width) each, coarse to fine.
            mask_features: (batch, mask_feature_size, height, width), the per-pixel embedding.
            valid_sizes: per map (batch, 2), rows and columns that are image; everything if None.
            output_attentions: return attention weights (computed without fused attention then).

        Returns:
            Everything the heads need.
        """
        batch = mask_features.shape[0]
        level_embeddings = self.level_embed()
        memories = [
            self._memory(
                self.input_projections[level](feature_map),
                level_embeddings[level],
                mask_features,
                None if valid_sizes is None else valid_sizes[level],
            )
            for level, feature_map in enumerate(multi_scale_features)
        ]
        return self.decoder(
            hidden_states=self.queries_features().expand(batch, -1, -1),
            query_positions=self.queries_embedder(),
            memories=memories,
            output_attentions=output_attentions,
        )

    @staticmethod
    def _memory(
        projected: torch.Tensor,
        level_embedding: torch.Tensor,
        mask_features: torch.Tensor,
        valid_sizes: torch.Tensor | None,
    ) -> "Memory":
        channels, height, width = projected.shape[1:]
        positions = sine_position_embedding(height, width, channels, projected.device, valid_sizes)
        # detached, since it only steers where queries look
        resized = nn.functional.interpolate(
            mask_features.detach(), size=(height, width), mode="bilinear", align_corners=False
        )
        return Memory(
            values=projected.flatten(2).transpose(1, 2) + level_embedding,
            positions=positions.to(projected.dtype).flatten(2).transpose(1, 2),
            mask_features=resized.flatten(2),
            valid=None if valid_sizes is None else valid_positions(height, width, valid_sizes),
        )


@dataclass
class Memory:
    """One map as the queries read it.

    Attributes:
        values: (batch, tokens, channels).
        positions: (1 or batch, tokens, channels), added to the values for the keys.
        mask_features: (batch, mask_feature_size, tokens), the per-pixel embedding at the map's resolution.
        valid: (batch, 1, tokens) bool, which tokens are image; all if None.
    """

    values: torch.Tensor
    positions: torch.Tensor
    mask_features: torch.Tensor
    valid: torch.Tensor | None


def valid_positions(height: int, width: int, valid_sizes: torch.Tensor) -> torch.Tensor:
    """(batch, 2) rows and columns that are image -> (batch, 1, height * width) bool."""
    return mask_of_sizes(valid_sizes, height, width).flatten(1).unsqueeze(1)


class MaskedAttentionDecoder(nn.Module):
    """The layers, with a prediction before the first and after each.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ProScaleMask2FormerConfig):
        super().__init__()
        self.layers = nn.ModuleList(MaskedAttentionLayer(config) for _ in range(config.decoder_layers - 1))
        self.layernorm = nn.LayerNorm(config.hidden_dim)
        self.mask_predictor = MaskPredictor(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        query_positions: torch.Tensor,
        memories: list[Memory],
        output_attentions: bool = False,
    ) -> MaskDecoderOutput:
        """
        Args:
            hidden_states: (batch, queries, channels).
            query_positions: (queries, channels), added to the queries in every layer.
            memories: the maps, coarse to fine; layer i reads the (i modulo their number)-th.
            output_attentions: return attention weights.

        Returns:
            All predictions' states; attention weights only if asked for.
        """
        all_hidden_states, self_attentions, cross_attentions = [hidden_states], [], []
        query_states = [self.layernorm(hidden_states)]
        mask_embeddings = [self.mask_predictor(query_states[-1])]
        for index, layer in enumerate(self.layers):
            memory = memories[index % len(memories)]
            attend = attention_region(mask_embeddings[-1], memory)
            hidden_states, self_attention, cross_attention = layer(
                hidden_states, query_positions, memory.values, memory.positions, attend, output_attentions
            )
            all_hidden_states.append(hidden_states)
            self_attentions.append(self_attention)
            cross_attentions.append(cross_attention)
            query_states.append(self.layernorm(hidden_states))
            mask_embeddings.append(self.mask_predictor(query_states[-1]))
        return MaskDecoderOutput(
            query_states=tuple(query_states),
            mask_embeddings=tuple(mask_embeddings),
            hidden_states=tuple(all_hidden_states),
            attentions=tuple(self_attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if output_attentions else None,
        )


@torch.no_grad()
def attention_region(mask_embedding: torch.Tensor, memory: Memory) -> torch.Tensor:
    """Where each query may look: inside its mask (probability at least 0.5); everywhere if its mask is empty.

    Args:
        mask_embedding: (batch, queries, mask_feature_size).
        memory: the map to look at.

    Returns:
        (batch, 1, queries, tokens) bool, True where attention is allowed; never on padding.
    """
    inside = masks_of_tokens(mask_embedding, memory.mask_features) >= 0  # the logit of 0.5; (batch, queries, tokens)
    if memory.valid is not None:
        inside = inside & memory.valid
    empty = ~inside.any(dim=-1, keepdim=True)
    everywhere = empty if memory.valid is None else empty & memory.valid
    return (inside | everywhere).unsqueeze(1)


class MaskedAttentionLayer(GradientCheckpointingLayer):
    """Masked cross-attention, self-attention, feed-forward: each with a residual, dropout and a layer norm.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ProScaleMask2FormerConfig):
        super().__init__()
        channels = config.hidden_dim
        self.pre_norm = config.pre_norm
        self.cross_attn = MaskedCrossAttention(config)
        self.cross_attn_layer_norm = nn.LayerNorm(channels)
        self.self_attn = SelfAttention(config, channels, config.num_attention_heads, config.dropout)
        self.self_attn_layer_norm = nn.LayerNorm(channels)
        self.fc1 = Linear(channels, config.dim_feedforward)
        self.fc2 = Linear(config.dim_feedforward, channels)
        self.final_layer_norm = nn.LayerNorm(channels)
        self.activation = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        query_positions: torch.Tensor,
        memory: torch.Tensor,
        memory_positions: torch.Tensor,
        attend: torch.Tensor,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: (batch, queries, channels).
            query_positions: (queries, channels).
            memory: (batch, tokens, channels).
            memory_positions: (1 or batch, tokens, channels).
            attend: (batch, 1, queries, tokens) bool, True where cross-attention is allowed.
            output_attentions: return attention weights.

        Returns:
            The new hidden states, the self-attention and the cross-attention weights (None unless asked for).
        """
        hidden_states, cross_weights = self._block(
            hidden_states,
            self.cross_attn_layer_norm,
            lambda x: self.cross_attn(x, query_positions, memory, memory_positions, attend, output_attentions),
        )
        hidden_states, self_weights = self._block(
            hidden_states,
            self.self_attn_layer_norm,
            lambda x: self.self_attn(x, query_positions, output_attentions),
        )
        hidden_states, _ = self._block(
            hidden_states,
            self.final_layer_norm,
            lambda x: (self.fc2(self.dropout(self.activation(self.fc1(x)))), None),
        )
        return hidden_states, self_weights, cross_weights

    def _block(
        self, hidden_states: torch.Tensor, norm: nn.LayerNorm, block: Callable
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, weights = block(norm(hidden_states) if self.pre_norm else hidden_states)
        output = hidden_states + self.dropout(output)
        return (output if self.pre_norm else norm(output)), weights


class MaskedCrossAttention(nn.Module):
    """Queries attend to a map's tokens, each within its own region. Weights are stored as `nn.MultiheadAttention`'s.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ProScaleMask2FormerConfig):
        super().__init__()
        channels = config.hidden_dim
        self.config = config
        self.num_heads = config.num_attention_heads
        self.dropout = config.dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = Linear(channels, channels)

    def reset_parameters(self) -> None:
        """Begin like a linear layer: Xavier weights, no bias."""
        init.xavier_uniform_(self.in_proj_weight, gain=self.config.init_xavier_std)
        init.zeros_(self.in_proj_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        query_positions: torch.Tensor,
        memory: torch.Tensor,
        memory_positions: torch.Tensor,
        attend: torch.Tensor,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Arguments as in [`MaskedAttentionLayer.forward`]; returns (batch, queries, channels) and the weights."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query = linear(hidden_states + query_positions, weights[0], biases[0])
        key = linear(memory + memory_positions, weights[1], biases[1])
        value = linear(memory, weights[2], biases[2])
        output, attention = multi_head_attention(self, query, key, value, attend, output_attentions)
        return self.out_proj(output), attention


class MaskPredictor(nn.Module):
    """Turns query states into mask embeddings; a mask is its embedding's product with the per-pixel embedding.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ProScaleMask2FormerConfig):
        super().__init__()
        channels = config.hidden_dim
        self.mask_embedder = nn.Sequential(
            nn.Sequential(UniformLinear(channels, channels), nn.ReLU()),
            nn.Sequential(UniformLinear(channels, channels), nn.ReLU()),
            nn.Sequential(UniformLinear(channels, config.mask_feature_size)),
        )

    def forward(self, query_states: torch.Tensor) -> torch.Tensor:
        """(batch, queries, channels) -> (batch, queries, mask_feature_size)."""
        return self.mask_embedder(query_states)


def predict_masks(mask_embeddings: torch.Tensor, mask_features: torch.Tensor) -> torch.Tensor:
    """Masks of one prediction.

    Args:
        mask_embeddings: (batch, queries, mask_feature_size).
        mask_features: (batch, mask_feature_size, height, width).

    Returns:
        (batch, queries, height, width) logits.
    """
    return masks_of_tokens(mask_embeddings, mask_features.flatten(2)).unflatten(2, mask_features.shape[2:])


def masks_of_tokens(mask_embeddings: torch.Tensor, mask_features: torch.Tensor) -> torch.Tensor:
    """(batch, queries, channels) and (batch, channels, tokens) -> (batch, queries, tokens) logits."""
    if not suits_onednn(mask_embeddings, mask_features):
        return mask_embeddings @ mask_features
    # Maps are channels last, so that their tokens are the rows of a linear layer's weight; `bmm` would copy them.
    masks = [linear(rows, tokens.T) for rows, tokens in zip(mask_embeddings, mask_features, strict=True)]
    return torch.stack(masks) if len(masks) > 1 else masks[0][None]
