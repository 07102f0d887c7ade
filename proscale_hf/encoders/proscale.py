"""The PRO-SCALE encoder (https://arxiv.org/abs/2404.14657, section 3.1, figure 3): token length grows with depth.

Stage 1 works on the coarsest map alone, stage 2 on its output and the next map, stage 3 on all. Before they enter,
the coarser maps are re-calibrated with the finest one (appendix C), which itself enters only in the last stage.
"""

import itertools

import torch
from torch import nn

from proscale_hf.encoders.configuration import EncoderConfig
from proscale_hf.encoders.layer import encoder_layer
from proscale_hf.layers.deformable_encoder import TokenGrid, maps_to_tokens, tokens_to_maps
from proscale_hf.layers.linear import Linear


class ProScaleEncoder(nn.Module):
    """Deformable-attention stages over growing token lists, for any number of maps (one stage each).

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        stage_ends = list(itertools.accumulate(config.encoder_stage_layers))
        self.stages = list(itertools.pairwise([0, *stage_ends]))  # first and last + 1 layer of each stage
        self.stage_residual = config.stage_residual
        self.layers = nn.ModuleList(
            encoder_layer(config, stage + 1)
            for stage, (start, end) in enumerate(self.stages)
            for _ in range(start, end)
        )
        self.token_recalibration = None if config.token_recalibration == "none" else TokenRecalibration(config)

    def forward(
        self,
        feature_maps: list[torch.Tensor],
        position_embeddings: list[torch.Tensor],
        padding: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """
        Args:
            feature_maps: (batch, channels, height, width) each, coarse to fine (s4, s3, s2 in the paper).
            position_embeddings: (1 or batch, channels, height, width) each, level embedding included.
            padding: (batch, height, width) bool for each map, True below and to the right of an image. What the maps
                hold there has no effect on the rest of them.

        Returns:
            The enhanced maps, in the shapes and order of `feature_maps`.
        """
        grid = TokenGrid.of_maps(feature_maps, padding)
        positions = maps_to_tokens(position_embeddings)
        if self.token_recalibration is not None:
            *coarser, finest = feature_maps
            if padding is not None:
                finest = finest.masked_fill(padding[-1][:, None], 0)
            feature_maps = [*(self.token_recalibration(coarse, finest) for coarse in coarser), finest]

        tokens = positions.new_empty((feature_maps[0].shape[0], 0, positions.shape[-1]))
        for stage, (start, end) in enumerate(self.stages):
            tokens = torch.cat((tokens, maps_to_tokens([feature_maps[stage]])), dim=1)
            stage_input, stage_positions, stage_grid = (
                tokens,
                positions[:, : tokens.shape[1]],
                grid.first(stage + 1),
            )
            is_last = stage + 1 == len(self.stages)
            for layer in self.layers[start:end]:
                tokens = layer(tokens, stage_positions, stage_grid)
                if self.stage_residual and not is_last:
                    tokens = tokens + stage_input
        return tokens_to_maps(tokens, grid.shapes_list)


class TokenRecalibration(nn.Module):
    """Weigh a coarse map by an attention map made from the finest one (appendix C, equation 4).

    One set of weights serves all coarser maps, as in the released code. That code also takes the memory of (tokens,
    channels) for (channels, height, width); the layout "original" does the same, for weights trained so.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.temperature = config.token_recalibration_temperature
        self.layout = config.token_recalibration_layout
        self.is_convolution = config.token_recalibration == "conv"
        self.projection = (
            nn.Conv2d(config.feature_size, 1, kernel_size=1) if self.is_convolution else Linear(config.feature_size, 1)
        )

    def forward(self, coarse: torch.Tensor, finest: torch.Tensor) -> torch.Tensor:
        """
        Args:
            coarse: (batch, channels, height, width), the map to weigh.
            finest: (batch, channels, larger height, larger width).

        Returns:
            The weighted map, in the shape of `coarse`.
        """
        if self.layout == "original":
            return self._forward_original_layout(coarse, finest)
        resized = _resize(finest, coarse)
        if self.is_convolution:
            logits = self.projection(resized)
        else:
            logits = self.projection(resized.movedim(1, -1)).movedim(-1, 1)  # (batch, 1, height, width)
        return coarse * self._gate(logits)

    def _forward_original_layout(self, coarse: torch.Tensor, finest: torch.Tensor) -> torch.Tensor:
        """The linear layer misreads the finest map alone, the convolution misreads both."""
        resized = _resize(_misread(finest), coarse)
        if self.is_convolution:
            weighted = _misread(coarse) * self._gate(self.projection(resized))
            tokens = weighted.view(coarse.shape[0], -1, coarse.shape[1])  # (batch, tokens, channels)
            return tokens.transpose(1, 2).reshape(coarse.shape)
        tokens = resized.reshape(coarse.shape[0], -1, coarse.shape[1])  # (batch, tokens, channels)
        logits = self.projection(tokens).transpose(1, 2).unflatten(2, coarse.shape[-2:])
        return coarse * self._gate(logits)

    def _gate(self, logits: torch.Tensor) -> torch.Tensor:
        return (self.temperature * logits).sigmoid()


def _resize(feature_map: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return nn.functional.interpolate(feature_map, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _misread(feature_map: torch.Tensor) -> torch.Tensor:
    """The memory of the map's (tokens, channels), taken for (channels, height, width)."""
    return feature_map.flatten(2).transpose(1, 2).reshape(feature_map.shape)
