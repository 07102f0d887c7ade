"""The full-length encoder of Mask2Former (https://arxiv.org/abs/2112.01527): every layer sees all tokens."""

import torch
from torch import nn

from proscale_hf.encoders.configuration import EncoderConfig
from proscale_hf.layers.deformable_encoder import DeformableEncoderLayer, TokenGrid, maps_to_tokens, tokens_to_maps


class Mask2FormerEncoder(nn.Module):
    """`encoder_layers` deformable-attention layers over the tokens of all maps.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        num_levels = len(config.encoder_strides)
        self.layers = nn.ModuleList(DeformableEncoderLayer(config, num_levels) for _ in range(config.encoder_layers))

    def forward(self, feature_maps: list[torch.Tensor], position_embeddings: list[torch.Tensor]) -> list[torch.Tensor]:
        """
        Args:
            feature_maps: (batch, channels, height, width) each, coarse to fine.
            position_embeddings: (1, channels, height, width) each, level embedding included.

        Returns:
            The enhanced maps, in the shapes and order of `feature_maps`.
        """
        grid = TokenGrid.of_maps(feature_maps)
        tokens = maps_to_tokens(feature_maps)
        positions = maps_to_tokens(position_embeddings)
        for layer in self.layers:
            tokens = layer(tokens, positions, grid)
        return tokens_to_maps(tokens, grid.shapes_list)
