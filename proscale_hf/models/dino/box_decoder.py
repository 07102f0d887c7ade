"""The decoder of DINO (https://arxiv.org/abs/2203.03605): queries with boxes, which every layer refines.

"Look forward twice" (section 3.4): a layer's prediction also trains the layer before it. Boxes are computed twice with
one head. The next layer starts from the one of the query as it is, without its gradient. The prediction is that of the
normalised query, and refines the box that the layer before made, with its gradient.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from proscale_hf.layers.attention import SelfAttention
from proscale_hf.layers.boxes import refined
from proscale_hf.layers.deformable_encoder import DeformableAttention, TokenGrid
from proscale_hf.layers.linear import Linear
from proscale_hf.layers.position_embedding import sine_box_embedding
from proscale_hf.models.dino.configuration_proscale_dino import ProScaleDinoConfig
from proscale_hf.models.dino.heads import BoxHead


class DecodedBoxes(NamedTuple):
    """
    Attributes:
        query_states: (layers, batch, queries, channels), the normalised queries after each layer.
        boxes: (layers, batch, queries, 4) float32, the boxes that each layer predicts.
        reference_boxes: (layers, batch, queries, 4) float32, those that each layer looked around.
        hidden_states: the queries before the first and after each layer, (batch, queries, channels) each.
        attentions: self-attention weights of each layer, (batch, heads, queries, queries); only if asked for.
    """

    query_states: torch.Tensor
    boxes: torch.Tensor
    reference_boxes: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...]
    attentions: tuple[torch.Tensor, ...] | None


class BoxDecoder(nn.Module):
    """Layers of queries that look around their boxes.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ProScaleDinoConfig):
        super().__init__()
        channels = config.feature_size
        self.measures_padded_image = config.batch_padding == "original"
        self.layers = nn.ModuleList(BoxDecoderLayer(config) for _ in range(config.decoder_layers))
        self.layernorm = nn.LayerNorm(channels)
        self.position_head = nn.Sequential(Linear(2 * channels, channels), nn.ReLU(), Linear(channels, channels))
        self.box_head = BoxHead(channels)

    def forward(
        self,
        hidden_states: torch.Tensor,
        boxes: torch.Tensor,
        memory: torch.Tensor,
        grid: TokenGrid,
        attend: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> DecodedBoxes:
        """
        Args:
            hidden_states: (batch, queries, channels).
            boxes: (batch, queries, 4) float32, where queries look at first, centre and size as shares of the image.
            memory: (batch, tokens, channels), enhanced.
            grid: where the tokens lie.
            attend: (1 or batch, 1, 1 or queries, queries) bool, True where a query may see another; everywhere if None.
            output_attentions: return attention weights.

        Returns:
            What each layer says.
        """
        ratios = None if grid.valid_ratios is None else grid.valid_ratios.repeat(1, 1, 2)[:, None]
        all_hidden_states, attentions, query_states, predicted, looked_at = [hidden_states], [], [], [], []
        refined_boxes = boxes
        for layer in self.layers:
            boxes = refined_boxes.detach()
            references = boxes[:, :, None] if ratios is None else boxes[:, :, None] * ratios
            embedded = sine_box_embedding(
                references[:, :, -1] if self.measures_padded_image else boxes, hidden_states.shape[-1] // 2
            )
            positions = self.position_head(embedded.to(hidden_states.dtype))
            hidden_states, attention = layer(
                hidden_states, positions, memory, grid, references, attend, output_attentions
            )
            all_hidden_states.append(hidden_states)
            attentions.append(attention)
            query_states.append(self.layernorm(hidden_states))
            predicted.append(refined(refined_boxes, self.box_head(query_states[-1])))
            looked_at.append(boxes)
            refined_boxes = refined(boxes, self.box_head(hidden_states))
        return DecodedBoxes(
            torch.stack(query_states),
            torch.stack(predicted),
            torch.stack(looked_at),
            tuple(all_hidden_states),
            tuple(attentions) if output_attentions else None,
        )


class BoxDecoderLayer(GradientCheckpointingLayer):
    """Self-attention, attention around the queries' boxes, feed-forward: each with dropout, residual and a layer norm.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ProScaleDinoConfig):
        super().__init__()
        channels = config.feature_size
        self.self_attn = SelfAttention(config, channels, config.num_attention_heads, config.dropout)
        self.self_attn_layer_norm = nn.LayerNorm(channels)
        self.cross_attn = DeformableAttention(
            channels, config.num_attention_heads, config.num_feature_levels, config.decoder_num_points
        )
        self.cross_attn_layer_norm = nn.LayerNorm(channels)
        self.fc1 = Linear(channels, config.decoder_feedforward_dim)
        self.fc2 = Linear(config.decoder_feedforward_dim, channels)
        self.final_layer_norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        memory: torch.Tensor,
        grid: TokenGrid,
        references: torch.Tensor,
        attend: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: (batch, queries, channels).
            positions: (batch, queries, channels), added for queries and keys, not for values.
            memory: (batch, tokens, channels).
            grid: where the tokens lie.
            references: (batch, queries, 1 or levels, 4) float32, the boxes, with 0 and 1 at the edges of a map.
            attend: see [`BoxDecoder.forward`].
            output_attentions: return self-attention weights.

        Returns:
            (batch, queries, channels), and the weights or None.
        """
        attended, attention = self.self_attn(hidden_states, positions, output_attentions, attend)
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attended))
        attended = self.cross_attn(hidden_states + positions, memory, grid, references)
        hidden_states = self.cross_attn_layer_norm(hidden_states + self.dropout(attended))
        expanded = self.dropout(self.fc1(hidden_states).relu())
        return self.final_layer_norm(hidden_states + self.dropout(self.fc2(expanded))), attention
