"""Attention among queries, or among the tokens of a map, by the implementation that the configuration names."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from proscale_hf.layers.linear import Linear


class SelfAttention(nn.Module):
    """Queries, or the tokens of a map, attend to each other.

    Args:
        config: the model's; transformers notes there which implementation of attention to take.
        channels: of the queries or tokens.
        num_heads: attention heads.
        dropout: probability for an attention weight.
    """

    def __init__(self, config: PreTrainedConfig, channels: int, num_heads: int, dropout: float):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = Linear(channels, channels)
        self.k_proj = Linear(channels, channels)
        self.v_proj = Linear(channels, channels)
        self.out_proj = Linear(channels, channels)

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        output_attentions: bool = False,
        attend: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: (batch, queries, channels).
            positions: (queries, channels) or (1 or batch, queries, channels), added for queries and keys, not for
                values.
            output_attentions: return the weights.
            attend: (1 or batch, 1, 1 or queries, queries) bool, True where attention is allowed; everywhere if None.

        Returns:
            (batch, queries, channels), and the weights (batch, heads, queries, queries) or None.
        """
        positioned = hidden_states + positions
        query, key, value = self.q_proj(positioned), self.k_proj(positioned), self.v_proj(hidden_states)
        output, attention = multi_head_attention(self, query, key, value, attend, output_attentions)
        return self.out_proj(output), attention


def multi_head_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attend: torch.Tensor | None,
    output_attentions: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Split into heads and attend with the configured implementation; eagerly where the weights are wanted.

    Args:
        module: the attention module, with `config`, `num_heads` and `dropout`.
        query: (batch, queries, channels).
        key: (batch, tokens, channels).
        value: (batch, tokens, channels).
        attend: (batch, 1, queries, tokens) bool, True where attention is allowed; everywhere if None.
        output_attentions: return the weights.

    Returns:
        (batch, queries, channels), and the weights (batch, heads, queries, tokens) or None.
    """
    query, key, value = (
        x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)  # (batch, heads, length, head_dim)
        for x in (query, key, value)
    )
    implementation = "eager" if output_attentions else module.config._attn_implementation
    attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
    output, weights = attention_function(
        module,
        query,
        key,
        value,
        attend,
        dropout=module.dropout if module.training else 0.0,
        scaling=query.shape[-1] ** -0.5,
        is_causal=False,
    )
    return output.flatten(2), weights if output_attentions else None


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, in transformers' interface; heads first in, (batch, queries, heads, head_dim) out."""
    logits = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask, float("-inf"))
    weights = logits.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    dropped = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (dropped @ value).transpose(1, 2), weights
