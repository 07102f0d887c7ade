"""The full-length encoder of Mask2Former (https://arxiv.org/abs/2112.01527): every layer sees all tokens."""

import torch
from torch import nn

from proscale_hf.encoders.configuration import EncoderConfig
from proscale_hf.encoders.layer import encoder_layer
from proscale_hf.layers.deformable_encoder import TokenGrid, maps_to_tokens, tokens_to_maps


class Mask2FormerEncoder(nn.Module):
    """`encoder_layers` deformable-attention layers over the tokens of all maps.

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
            feature_maps: (batch, channels, height, width) each, coarse to fine.
            position_embeddings: (1 or batch, channels, height, width) each, level embedding included.
            padding: (batch, height, width) bool for each map, True below and to the right of an image. What the maps
                hold there has no effect on the rest of them.

        Returns:
            The enhanced maps, in the shapes and order of `feature_maps`.
        """
        grid = TokenGrid.of_maps(feature_maps, padding)
        tokens = maps_to_tokens(feature_maps)
        positions = maps_to_tokens(position_embeddings)
        for layer in self.layers:
            tokens = layer(tokens, positions, grid)
        return tokens_to_maps(tokens, grid.shapes_list)
