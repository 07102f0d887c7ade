"""The hybrid encoder of RT-DETR (https://arxiv.org/abs/2304.08069, section 4.2), RT-M2F's in PRO-SCALE's tables.

Attention stays within the coarsest map ("AIFI"). Convolutions then carry what it found to the finer maps, from coarse
to fine, and back again ("CCFF"), each time by a fusion of two maps. Sizes are those of RT-DETR-R50: one attention
layer, three blocks in each fusion. The position embedding is the pixel decoder's, as for all encoders here.

Blocks stay as they are trained, a 3x3 and a 1x1 convolution side by side. So they were when PRO-SCALE counted their
cost: merged into one 3x3 convolution each, the encoder would cost 8 % less than its tables say; see docs/method.md.
"""

import itertools

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from proscale_hf.encoders.configuration import EncoderConfig
from proscale_hf.layers.attention import SelfAttention
from proscale_hf.layers.linear import Linear


BLOCKS_OF_A_FUSION = 3


class RTEncoder(nn.Module):
    """Attention in the coarsest map, then fusion from coarse to fine and from fine to coarse, for any number of maps.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        channels = config.feature_size
        steps = [coarse // fine for coarse, fine in itertools.pairwise(config.encoder_strides)]  # coarse to fine
        self.attention = IntraScaleLayer(config)
        self.lateral = nn.ModuleList(ConvolutionNorm(channels, channels, 1, is_activated=True) for _ in steps)
        self.top_down = nn.ModuleList(Fusion(channels) for _ in steps)
        self.downsampling = nn.ModuleList(
            ConvolutionNorm(channels, channels, 3, stride=step, is_activated=True) for step in reversed(steps)
        )
        self.bottom_up = nn.ModuleList(Fusion(channels) for _ in steps)

    def forward(self, feature_maps: list[torch.Tensor], position_embeddings: list[torch.Tensor]) -> list[torch.Tensor]:
        """
        Args:
            feature_maps: (batch, channels, height, width) each, coarse to fine.
            position_embeddings: (1, channels, height, width) each, level embedding included; the first one is read.

        Returns:
            The enhanced maps, in the shapes and order of `feature_maps`.
        """
        coarsest, *finer_maps = feature_maps
        tokens = self.attention(
            coarsest.flatten(2).transpose(1, 2),  # (batch, tokens, channels)
            position_embeddings[0].flatten(2).transpose(1, 2),
        )
        current = tokens.transpose(1, 2).unflatten(2, coarsest.shape[-2:])  # (batch, channels, height, width)

        laterals = []
        for lateral, fusion, finer in zip(self.lateral, self.top_down, finer_maps, strict=True):
            laterals.append(lateral(current))
            upsampled = nn.functional.interpolate(laterals[-1], size=finer.shape[-2:], mode="nearest")
            current = fusion(upsampled, finer)

        enhanced = [current]
        for downsample, fusion, coarser in zip(self.downsampling, self.bottom_up, reversed(laterals), strict=True):
            enhanced.append(fusion(downsample(enhanced[-1]), coarser))
        return enhanced[::-1]


class IntraScaleLayer(GradientCheckpointingLayer):
    """Self-attention among the tokens of one map and a feed-forward block, each with dropout, residual and layer norm.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        channels = config.feature_size
        self.self_attn = SelfAttention(config, channels, config.num_attention_heads, config.dropout)
        self.self_attn_layer_norm = nn.LayerNorm(channels)
        self.fc1 = Linear(channels, config.encoder_feedforward_dim)
        self.fc2 = Linear(config.encoder_feedforward_dim, channels)
        self.final_layer_norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor, position_embeddings: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states: (batch, tokens, channels).
            position_embeddings: (1, tokens, channels), added for queries and keys, not for values.

        Returns:
            (batch, tokens, channels).
        """
        attended, _ = self.self_attn(hidden_states, position_embeddings)
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attended))
        expanded = self.dropout(nn.functional.gelu(self.fc1(hidden_states)))
        return self.final_layer_norm(hidden_states + self.dropout(self.fc2(expanded)))


class Fusion(nn.Module):
    """Two maps of one size become one: a projection of both through the blocks, plus one that goes past them.

    Args:
        channels: of each of the maps.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.through = ConvolutionNorm(2 * channels, channels, 1, is_activated=True)
        self.past = ConvolutionNorm(2 * channels, channels, 1, is_activated=True)
        self.blocks = nn.Sequential(*(TwoBranchBlock(channels) for _ in range(BLOCKS_OF_A_FUSION)))

    def forward(self, carried: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """
        Args:
            carried: (batch, channels, height, width), what comes from another scale.
            own: as `carried`, the map of this scale.

        Returns:
            (batch, channels, height, width).
        """
        both = torch.cat((carried, own), dim=1)  # (batch, 2 * channels, height, width)
        return self.blocks(self.through(both)) + self.past(both)


class TwoBranchBlock(nn.Module):
    """A RepVGG block (https://arxiv.org/abs/2101.03697): the sum of a 3x3 and a 1x1 convolution, activated.

    Args:
        channels: of the map.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.wide = ConvolutionNorm(channels, channels, 3)
        self.pointwise = ConvolutionNorm(channels, channels, 1)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> the same shape."""
        return nn.functional.silu(self.wide(feature_map) + self.pointwise(feature_map))


class ConvolutionNorm(nn.Sequential):
    """A convolution without bias that keeps the size but for its stride, batch norm, and SiLU if wanted.

    Args:
        in_channels: channels of the map.
        out_channels: channels of the result.
        kernel_size: of the convolution, odd.
        stride: of the convolution.
        is_activated: whether SiLU comes last.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, is_activated: bool = False
    ):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.SiLU() if is_activated else nn.Identity(),
        )
