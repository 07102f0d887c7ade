"""Faster layers for transformers' Swin (https://arxiv.org/abs/2103.14030) at inference on the CPU.

A layer takes a few rows of windows through all its steps before it takes the next rows, so intermediate tensors stay in
the cache; transformers' own code makes some thirty tensors of the whole map. Weights, their names and the results are
the same. In training, on accelerators and in compiled graphs transformers' code runs.
"""

import torch
from torch import nn
from transformers.models.swin.modeling_swin import SwinLayer, SwinPatchMerging

from proscale_hf.layers.untouched import is_untouched


CPU_TOKENS = 4096  # worked on at once, roughly
NOT_ATTENDED = -100.0  # added to the logits of tokens that do not belong together; transformers' value


def goes_in_strips(module: nn.Module, tokens: torch.Tensor) -> bool:
    """Whether this is inference on the CPU, neither compiled nor traced, and no part of the module was touched."""
    return tokens.device.type == "cpu" and not module.training and not torch.is_grad_enabled() and is_untouched(module)


class SwinLayerInStrips(SwinLayer):
    """transformers' `SwinLayer`, in strips where that is possible."""

    def forward(
        self, hidden_states: torch.Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: (batch, height * width, channels).
            input_dimensions: height and width.
            always_partition: attend in windows of the configured size even if the map is smaller, as backbones do.
            **kwargs: for transformers' own code.

        Returns:
            (batch, height * width, channels), and attention weights or None; only transformers' own code gives weights.
        """
        uses_sdpa = self.attention.config._attn_implementation == "sdpa"
        if not (goes_in_strips(self, hidden_states) and always_partition and uses_sdpa):
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)
        height, width = input_dimensions
        maps = hidden_states.unflatten(1, (height, width))
        output = torch.empty_like(maps)
        biases = self._biases()
        window_rows = -(-height // self.window_size)
        rows_at_once = max(1, CPU_TOKENS // (len(maps) * width * self.window_size))
        for window_row in torch.arange(window_rows).split(rows_at_once):
            # Shifted windows at the bottom continue at the top; rows beyond the image are padding.
            rows = (window_row[:, None] * self.window_size + torch.arange(self.window_size)).flatten() + self.shift_size
            rows = rows % (window_rows * self.window_size)
            is_image = rows < height
            strip = maps.index_select(1, rows.clamp(max=height - 1))  # (batch, rows, width, channels)
            normed = self.layernorm_before(strip) * is_image[:, None, None]
            strip += self._attend(normed, biases, window_row == window_rows - 1)
            strip += self.mlp(self.layernorm_after(strip))
            output.index_copy_(1, rows[is_image], strip[:, is_image])
        return output.flatten(1, 2), None

    def _attend(self, strip: torch.Tensor, biases: torch.Tensor, is_bottom: torch.Tensor) -> torch.Tensor:
        """
        Attend inside of the windows.

        Args:
            strip: (batch, rows, width, channels), rows of whole windows.
            biases: see `_biases`.
            is_bottom: (window rows,) bool, whether a row of windows is the last one of the map.

        Returns:
            The attention's result, in the shape of `strip`.
        """
        side, attention = self.window_size, self.attention
        width = strip.shape[2]
        padded = nn.functional.pad(strip, (0, 0, 0, -width % side)).roll(-self.shift_size, 2)
        windows = padded.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
        grid = windows.shape[:3]  # batch, rows and columns of windows
        tokens = windows.reshape(-1, side * side, strip.shape[3])
        query, key, value = (
            projection(tokens).unflatten(2, (attention.num_attention_heads, -1)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )  # (windows, heads, side * side, head_dim)
        if self.shift_size:
            is_right = torch.arange(grid[2]) == grid[2] - 1
            kinds = 2 * is_bottom[:, None] + is_right.int()  # (rows, columns of windows)
            biases = biases[kinds.expand(grid).flatten()]  # (windows, heads, side * side, side * side)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, biases, scale=attention.scaling)
        attended = attention.o_proj(attended.transpose(1, 2).flatten(2)).unflatten(1, (side, side)).unflatten(0, grid)
        attended = attended.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (batch, rows, padded width, channels)
        return attended.roll(self.shift_size, 2)[:, :, :width]

    def _biases(self) -> torch.Tensor:
        """(1 or 4, heads, side * side, side * side): the biases that are added to a window's logits.

        With a shift there are four kinds of windows: inside, at the right, at the bottom, and at both. Those at an edge
        hold two or four parts of the map, which do not attend to each other.
        """
        biases = self.attention.relative_position_bias()
        if not self.shift_size:
            return biases
        is_behind = torch.arange(self.window_size) >= self.window_size - self.shift_size
        along_rows = (is_behind[:, None] != is_behind).repeat_interleave(self.window_size, 0)
        along_rows = along_rows.repeat_interleave(self.window_size, 1)  # (side * side, side * side)
        along_columns = (is_behind[:, None] != is_behind).repeat(self.window_size, self.window_size)
        is_apart = torch.stack(
            (torch.zeros_like(along_rows), along_columns, along_rows, along_rows | along_columns)
        ).unsqueeze(1)
        return biases + is_apart * NOT_ATTENDED


class SwinPatchMergingInStrips(SwinPatchMerging):
    """transformers' `SwinPatchMerging`, in strips where that is possible."""

    def forward(self, input_feature: torch.Tensor, input_dimensions: tuple[int, int]) -> torch.Tensor:
        """
        Args:
            input_feature: (batch, height * width, channels).
            input_dimensions: height and width.

        Returns:
            (batch, half the height * half the width, 2 * channels), sizes rounded up.
        """
        if not goes_in_strips(self, input_feature):
            return super().forward(input_feature, input_dimensions)
        maps = self.maybe_pad(input_feature.unflatten(1, input_dimensions), *input_dimensions)
        # (batch, height / 2, row, width / 2, column, channels) -> (batch, height / 2, width / 2, column, row, channels)
        patches = maps.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        rows_at_once = max(1, CPU_TOKENS // maps.shape[:3:2].numel())
        strips = [self.reduction(self.norm(strip.flatten(3))) for strip in patches.split(rows_at_once, dim=1)]
        return torch.cat(strips, dim=1).flatten(1, 2)
