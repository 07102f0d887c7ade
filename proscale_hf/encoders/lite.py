"""The encoder of Lite-DETR (https://arxiv.org/abs/2303.07446) as PRO-SCALE's tables have it: "H3L1-(5+1)x1", Lite-M2F.

The coarse maps hold few tokens and change in every layer; the finest one holds most of them and changes once. In all
layers but the last, the tokens of the coarser maps alone attend, to all tokens; in the last one, all tokens do. Plain
deformable attention is used throughout, without Lite-DETR's key-aware one, as in PRO-SCALE (section 4, "Baselines").

The papers leave room; what stands here is what makes the cost that of the paper's tables, see docs/method.md:
- "L1" is one low-level scale, the finest. H3 is three of Lite-DETR's four scales; Mask2Former has one scale less.
- In the last layer the coarser maps change too, as in Lite-DETR's released code.
- All feed-forward blocks have the same width. Lite-DETR's code narrows them for the finest map.
"""

import torch
from torch import nn

from proscale_hf.encoders.configuration import EncoderConfig
from proscale_hf.encoders.layer import encoder_layer
from proscale_hf.layers.deformable_encoder import TokenGrid, maps_to_tokens, tokens_to_maps


class LiteEncoder(nn.Module):
    """`encoder_layers` deformable-attention layers, of which only the last one changes the finest map.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        num_levels = len(config.encoder_strides)
        self.layers = nn.ModuleList(encoder_layer(config, num_levels) for _ in range(config.encoder_layers))

    def forward(
        self,
        feature_maps: list[torch.Tensor],
        position_embeddings: list[torch.Tensor],
        padding: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """
        Args:
            feature_maps: (batch, channels, height, width) each, coarse to fine; at least two.
            position_embeddings: (1 or batch, channels, height, width) each, level embedding included.
            padding: (batch, height, width) bool for each map, True below and to the right of an image. What the maps
                hold there has no effect on the rest of them.

        Returns:
            The enhanced maps, in the shapes and order of `feature_maps`.
        """
        grid = TokenGrid.of_maps(feature_maps, padding)
        positions = maps_to_tokens(position_embeddings)
        *coarser, finest = feature_maps
        high, low = maps_to_tokens(coarser), maps_to_tokens([finest])
        *high_layers, last_layer = self.layers
        for layer in high_layers:
            high = layer(torch.cat((high, low), dim=1), positions, grid, high.shape[1])
        tokens = last_layer(torch.cat((high, low), dim=1), positions, grid)
        return tokens_to_maps(tokens, grid.shapes_list)
