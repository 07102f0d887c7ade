"""From pixels to the tokens that queries read: backbone, feature levels, and the encoder.

An image's padding is kept out by not computing it, or, as in the original, masked in attention.
"""

from typing import NamedTuple

import torch
from torch import nn

from proscale_hf.backbones.loading import check_strides, freeze, load_backbone
from proscale_hf.encoders.choice import build_encoder
from proscale_hf.layers.deformable_encoder import TokenGrid, maps_to_tokens
from proscale_hf.models.dino.configuration_proscale_dino import ProScaleDinoConfig
from proscale_hf.models.dino.feature_levels import FeatureLevels
from proscale_hf.models.padding import pad_map, run_by_size


class EncodedPixels(NamedTuple):
    """
    Attributes:
        tokens: (batch, tokens, channels), level after level, coarse to fine.
        grid: where they lie, and which of them are padding.
        backbone_maps: (batch, channels, height, width) each, fine to coarse.
    """

    tokens: torch.Tensor
    grid: TokenGrid
    backbone_maps: tuple[torch.Tensor, ...]


class Maps(NamedTuple):
    """
    Attributes:
        backbone: (batch, channels, height, width) each, fine to coarse.
        enhanced: (batch, channels, height, width) each, coarse to fine.
        padding: (batch, height, width) bool for each enhanced map, True in the padding; None without padding.
    """

    backbone: tuple[torch.Tensor, ...]
    enhanced: list[torch.Tensor]
    padding: list[torch.Tensor] | None


class PixelEncoder(nn.Module):
    """Backbone, feature levels and encoder.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ProScaleDinoConfig):
        super().__init__()
        self.strides = tuple(config.feature_strides)
        self.backbone = load_backbone(config, self.strides)
        self.feature_levels = FeatureLevels(
            self.backbone.channels, config.num_feature_levels, config.feature_size, config.position_temperature
        )
        self.encoder = build_encoder(config)
        self.frozen = {"batch_norms": config.freeze_backbone_batch_norm, "stem": config.freeze_backbone_stem}
        self.train(self.training)

    def train(self, mode: bool = True) -> "PixelEncoder":
        """As in PyTorch, but for what is frozen in the backbone."""
        super().train(mode)
        freeze(self.backbone, **self.frozen)
        return self

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        sizes_alone: list[tuple[int, int]] | None = None,
    ) -> EncodedPixels:
        """
        Args:
            pixel_values: (batch, channels, height, width).
            pixel_mask: (batch, height, width), 1 = image, 0 = padding at the bottom and right, which is masked in
                attention then.
            sizes_alone: (height, width) of each image without padding, instead of `pixel_mask`: each image passes
                through at its size, so that nothing depends on the batch's padding.

        Returns:
            The enhanced tokens. In the padding they hold something without a meaning.
        """
        if sizes_alone is None or set(sizes_alone) == {tuple(pixel_values.shape[-2:])}:
            maps = self.run(pixel_values, pixel_mask)
        else:
            maps = padded_together(*run_by_size(self.run, pixel_values, sizes_alone))
        return EncodedPixels(
            maps_to_tokens(maps.enhanced), TokenGrid.of_maps(maps.enhanced, maps.padding), maps.backbone
        )

    def run(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None) -> Maps:
        """All maps of images of one size; with a mask, those of images that were padded to it."""
        backbone_maps = tuple(self.backbone(pixel_values).feature_maps)
        check_strides(backbone_maps, tuple(pixel_values.shape[-2:]), self.strides)
        levels = self.feature_levels(backbone_maps)
        padding = None if pixel_mask is None else padding_of_maps(pixel_mask, levels)
        positions = self.feature_levels.position_embeddings(levels, padding)
        return Maps(backbone_maps, self.encoder(levels, positions, padding), padding)


def padding_of_maps(pixel_mask: torch.Tensor, maps: list[torch.Tensor]) -> list[torch.Tensor]:
    """For each map (batch, height, width) bool, True where the nearest pixel, to the upper left, is padding."""
    mask = (pixel_mask == 0)[:, None].float()
    return [nn.functional.interpolate(mask, size=m.shape[-2:], mode="nearest")[:, 0] > 0 for m in maps]


def padded_together(groups: list[Maps], place: torch.Tensor) -> Maps:
    """The maps of groups of images, padded with zeros to one size for each level, and the padding.

    Args:
        groups: maps of images of one size each.
        place: (batch,) int64, where each image of the batch is once the groups are put in a row.
    """

    def batched(maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        size = max(m.shape[-2] for m in maps), max(m.shape[-1] for m in maps)
        return torch.cat([pad_map(m, size) for m in maps])[place]

    enhanced = list(zip(*(group.enhanced for group in groups), strict=True))
    real = [[torch.ones_like(m[:, :1], dtype=torch.bool) for m in maps] for maps in enhanced]
    return Maps(
        backbone=tuple(map(batched, zip(*(group.backbone for group in groups), strict=True))),
        enhanced=list(map(batched, enhanced)),
        padding=[~batched(maps)[:, 0] for maps in real],
    )
