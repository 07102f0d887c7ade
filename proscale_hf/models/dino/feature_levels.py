"""What the encoder gets: the backbone's maps and coarser ones, all of one width, and their position embeddings."""

import itertools

import torch
from torch import nn
from transformers import initialization as init

from proscale_hf.encoders.configuration import NORM_GROUPS
from proscale_hf.layers.deformable_encoder import valid_sizes
from proscale_hf.layers.position_embedding import sine_position_embedding


class FeatureLevels(nn.Module):
    """Projections of the backbone's maps, and convolutions that make coarser maps than it has.

    Args:
        backbone_channels: channels of the backbone's maps, fine to coarse.
        num_levels: how many maps there should be, at least as many as the backbone has.
        channels: of the maps that are made.
        temperature: of the position embedding.
    """

    def __init__(self, backbone_channels: list[int], num_levels: int, channels: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        extra = num_levels - len(backbone_channels)
        # the first extra map is made from the backbone's coarsest one as it is, each further one from the one before
        channels_of_extra = [backbone_channels[-1], *itertools.repeat(channels, extra)][:extra]
        self.input_projections = nn.ModuleList(
            [
                *(projection(before, channels, 3, stride=2) for before in reversed(channels_of_extra)),
                *(projection(before, channels, 1) for before in reversed(backbone_channels)),
            ]
        )
        self.level_embed = nn.Parameter(torch.zeros(num_levels, channels))

    def reset_parameters(self) -> None:
        """The embedding of a level tells its tokens from others, so it begins at random."""
        init.normal_(self.level_embed)

    def forward(self, backbone_maps: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """
        Args:
            backbone_maps: (batch, channels, height, width) each, fine to coarse.

        Returns:
            (batch, channels, height, width) for each level, coarse to fine.
        """
        # channels last: tokens are then views of maps and maps of tokens, and PyTorch's kernels are faster
        maps = [feature_map.contiguous(memory_format=torch.channels_last) for feature_map in reversed(backbone_maps)]
        extra = len(self.input_projections) - len(maps)
        levels = [layer(given) for layer, given in zip(self.input_projections[extra:], maps, strict=True)]
        coarsest = maps[0]
        for layer in reversed(self.input_projections[:extra]):
            coarsest = layer(coarsest)
            levels.insert(0, coarsest)
        return levels

    def position_embeddings(
        self, levels: list[torch.Tensor], padding: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """
        Args:
            levels: as [`forward`] returns them.
            padding: (batch, height, width) bool for each level, True in the padding of an image.

        Returns:
            (1 or batch, channels, height, width) each: the positions in a map plus the embedding of its level.
        """
        sizes = [None] * len(levels) if padding is None else valid_sizes(padding).unbind(1)
        return [
            sine_position_embedding(*level.shape[-2:], level.shape[1], level.device, level_sizes, self.temperature).to(
                level.dtype
            )
            + level_embed[:, None, None]
            for level, level_sizes, level_embed in zip(levels, sizes, self.level_embed, strict=True)
        ]


def projection(in_channels: int, channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """A convolution and a group norm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2),
        nn.GroupNorm(NORM_GROUPS, channels),
    )
