"""Pixel decoder: projections -> encoder -> per-pixel embedding (PRO-SCALE, figure 3 and section 3.1.1).

The encoder enhances the maps at strides 32, 16 and 8. The per-pixel embedding comes from the stride-4 map and the
finest enhanced one; with a pooling `pixel_embedding` that step has no weights but its norm's. Without a stride-4 map it
is the finest enhanced map itself, projected.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from proscale_hf.encoders.choice import build_encoder
from proscale_hf.encoders.configuration import NORM_GROUPS
from proscale_hf.layers.position_embedding import sine_position_embedding
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig


@dataclass
class PixelDecoderOutput(ModelOutput):
    """
    Attributes:
        multi_scale_features: the enhanced maps, (batch, feature_size, height, width) each, coarse to fine.
        mask_features: (batch, mask_feature_size, height, width), the per-pixel embedding, at the stride of the masks.
    """

    multi_scale_features: tuple[torch.Tensor, ...] | None = None
    mask_features: torch.Tensor | None = None


class PixelDecoder(nn.Module):
    """From the backbone's maps to the maps the mask decoder reads.

    Args:
        config: the model's configuration.
        backbone_channels: channels of the backbone's maps, fine to coarse.
    """

    def __init__(self, config: ProScaleMask2FormerConfig, backbone_channels: list[int]):
        super().__init__()
        channels = config.feature_size
        encoder_channels = backbone_channels[-len(config.encoder_strides) :]
        self.input_projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(in_channels, channels, kernel_size=1), nn.GroupNorm(NORM_GROUPS, channels))
            for in_channels in reversed(encoder_channels)
        )
        self.level_embed = nn.Parameter(torch.zeros(len(encoder_channels), channels))
        self.encoder = build_encoder(config)
        self.adapter_1, self.layer_1 = None, None
        if config.pixel_embedding != "none":
            self.adapter_1 = nn.Sequential(
                nn.Conv2d(backbone_channels[0], channels, kernel_size=1, bias=False),
                nn.GroupNorm(NORM_GROUPS, channels),
            )
            self.layer_1 = nn.Sequential(
                _pixel_embedding(config.pixel_embedding, channels), nn.GroupNorm(NORM_GROUPS, channels), nn.ReLU()
            )
        self.mask_projection = nn.Conv2d(channels, config.mask_feature_size, kernel_size=1)

    def reset_parameters(self) -> None:
        """The embedding of a level tells its tokens from others, so it begins at random."""
        init.normal_(self.level_embed)

    def forward(self, backbone_maps: tuple[torch.Tensor, ...]) -> PixelDecoderOutput:
        """
        Args:
            backbone_maps: (batch, channels, height, width) each, fine to coarse (strides 4, 8, 16, 32).

        Returns:
            The enhanced maps and the per-pixel embedding.
        """
        # channels last: tokens are then views of maps and maps of tokens, and PyTorch's kernels are faster
        maps = [feature_map.contiguous(memory_format=torch.channels_last) for feature_map in reversed(backbone_maps)]
        encoder_maps = maps[: len(self.input_projections)]  # coarse to fine
        projected = [
            projection(feature_map)
            for projection, feature_map in zip(self.input_projections, encoder_maps, strict=True)
        ]
        positions = [
            self.position_embedding(feature_map, level)
            for feature_map, level in zip(projected, self.level_embed, strict=True)
        ]
        enhanced = self.encoder(projected, positions)
        finest = enhanced[-1].contiguous(memory_format=torch.channels_last)
        if self.layer_1 is not None:
            lateral = self.adapter_1(maps[-1])
            upsampled = nn.functional.interpolate(finest, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
            finest = self.layer_1(lateral + upsampled)
        return PixelDecoderOutput(multi_scale_features=tuple(enhanced), mask_features=self.mask_projection(finest))

    @staticmethod
    def position_embedding(feature_map: torch.Tensor, level_embed: torch.Tensor) -> torch.Tensor:
        """(1, channels, height, width): the positions in a map plus the embedding of its level."""
        channels, height, width = feature_map.shape[1:]
        positions = sine_position_embedding(height, width, channels, feature_map.device)
        return positions.to(feature_map.dtype) + level_embed[:, None, None]


def _pixel_embedding(kind: str, channels: int) -> nn.Module:
    """The 3x3 step of the per-pixel embedding, which keeps the size."""
    if kind == "maxpool":
        return nn.MaxPool2d(kernel_size=3, stride=1, padding=1)
    if kind == "avgpool":
        return nn.AvgPool2d(kernel_size=3, stride=1, padding=1)
    return nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
