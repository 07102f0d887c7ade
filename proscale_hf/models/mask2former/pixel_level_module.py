"""Backbone and pixel decoder, for batches whose images have different sizes.

Padding is kept out by not computing it: images are grouped by the size they would be padded to alone, each group
passes through at that size, and the results are put together again. This holds for any backbone, and needs no masks.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from proscale_hf.backbones.loading import check_strides, freeze, load_backbone
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig
from proscale_hf.models.mask2former.pixel_decoder import PixelDecoder
from proscale_hf.models.padding import pad_map, run_by_size


@dataclass
class PixelLevelModuleOutput(ModelOutput):
    """
    Attributes:
        backbone_maps: (batch, channels, height, width) each, fine to coarse.
        multi_scale_features: (batch, feature_size, height, width) each, coarse to fine.
        mask_features: (batch, mask_feature_size, height / 4, width / 4), or at the finest stride there is.
    """

    backbone_maps: tuple[torch.Tensor, ...] | None = None
    multi_scale_features: tuple[torch.Tensor, ...] | None = None
    mask_features: torch.Tensor | None = None


class PixelLevelModule(nn.Module):
    """Backbone and pixel decoder.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ProScaleMask2FormerConfig):
        super().__init__()
        self.strides = tuple(config.feature_strides)
        self.encoder_strides = config.encoder_strides
        self.encoder = load_backbone(config, self.strides)
        self.decoder = PixelDecoder(config, self.encoder.channels)
        self.freeze_batch_norm = config.freeze_backbone_batch_norm
        self.train(self.training)

    def train(self, mode: bool = True) -> "PixelLevelModule":
        """As in PyTorch, but for what is frozen in the backbone."""
        super().train(mode)
        freeze(self.encoder, self.freeze_batch_norm)
        return self

    def forward(
        self, pixel_values: torch.Tensor, padded_sizes: list[tuple[int, int]] | None = None
    ) -> PixelLevelModuleOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width).
            padded_sizes: (height, width) that each image would be padded to if it were alone. Images are then
                processed at that size, those of one size together, so that nothing depends on the batch's padding.

        Returns:
            Maps of the whole batch. Beyond an image's own size they hold zeros, but for the per-pixel embedding:
            there the border repeats, so that resizing the masks sees an edge where the image alone has its edge.
        """
        height, width = pixel_values.shape[-2:]
        if padded_sizes is None or set(padded_sizes) == {(height, width)}:
            return self.run(pixel_values)

        outputs, place = run_by_size(self.run, pixel_values, padded_sizes)

        def batched(maps: list[torch.Tensor], stride: int, mode: str = "constant") -> torch.Tensor:
            target = math.ceil(height / stride), math.ceil(width / stride)
            return torch.cat([pad_map(feature_map, target, mode) for feature_map in maps])[place]

        fine_to_coarse = zip(*(o.backbone_maps for o in outputs), strict=True)
        coarse_to_fine = zip(*(o.multi_scale_features for o in outputs), strict=True)
        return PixelLevelModuleOutput(
            backbone_maps=tuple(map(batched, fine_to_coarse, self.strides)),
            multi_scale_features=tuple(map(batched, coarse_to_fine, self.encoder_strides)),
            mask_features=batched([o.mask_features for o in outputs], self.strides[0], mode="replicate"),
        )

    def run(self, pixel_values: torch.Tensor) -> PixelLevelModuleOutput:
        """Backbone and pixel decoder for images of one size."""
        backbone_maps = tuple(self.encoder(pixel_values).feature_maps)
        check_strides(backbone_maps, tuple(pixel_values.shape[-2:]), self.strides)
        decoded = self.decoder(backbone_maps)
        return PixelLevelModuleOutput(backbone_maps, decoded.multi_scale_features, decoded.mask_features)
