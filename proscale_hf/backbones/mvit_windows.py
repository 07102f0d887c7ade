"""Hybrid window attention in timm's MViTv2 (https://arxiv.org/abs/2112.01526, section 4.3), for images of any size.

timm's modules take images of at most 224 x 224, and attend over whole maps. As in MViTv2's detectors, most blocks here
attend in windows, whose size is the one that the weights were trained with. The last block of each stage, except in the
first stage, attends over the whole map; in two of these blocks keys and values are pooled once more. Names and shapes
of the weights stay timm's.
"""

import torch
from torch import nn


WINDOW = 56  # of the map at stride 4: all of it for the images that the weights were trained with


def use_hybrid_windows(backbone: nn.Module) -> None:
    """
    Replace the attention of timm's MViTv2, and leave any other backbone as it is.

    Args:
        backbone: a module with the timm model somewhere in it.
    """
    for model in backbone.modules():
        if type(model).__name__ == "MultiScaleVit" and model.cls_token is None:  # known without an import of timm
            _replace_attention(model.stages)


def _replace_attention(stages: nn.ModuleList) -> None:
    window = WINDOW
    for position, stage in enumerate(stages):
        for block in stage.blocks:
            stride = block.attn.pool_q.stride[0]
            sees_whole_map = position > 0 and block is stage.blocks[-1]
            if sees_whole_map and position in (1, 2):
                for pool in (block.attn.pool_k, block.attn.pool_v):
                    pool.stride = tuple(2 * step for step in pool.stride)
            block.attn = HybridWindowAttention(block.attn, None if sees_whole_map else window)
            window //= stride


class HybridWindowAttention(nn.Module):
    """Pooling attention in windows, or over the whole map.

    Args:
        attention: timm's `MultiScaleAttention`, whose parts this module takes over.
        window: side of a window in the incoming map; None for the whole map.
    """

    def __init__(self, attention: nn.Module, window: int | None):
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.residual_pooling = attention.residual_pooling
        self.window = window

    def forward(self, tokens: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, list[int]]:
        """
        Args:
            tokens: (batch, height * width, channels).
            size: height and width.

        Returns:
            (batch, new height * new width, new channels), and the new height and width.
        """
        heads = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1))  # (batch, tokens, 3, heads, channels)
        # (batch * heads, channels, height, width) each
        maps = (part.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, tuple(size)) for part in heads.unbind(2))
        pools = ((self.pool_q, self.norm_q), (self.pool_k, self.norm_k), (self.pool_v, self.norm_v))
        # (batch * heads, height, width, channels) each
        queries, keys, values = (norm(pool(part).movedim(1, 3)) for part, (pool, norm) in zip(maps, pools, strict=True))
        attended = self._attend(queries, keys, values)
        if self.residual_pooling:
            attended = attended + queries
        height, width = queries.shape[1:3]
        attended = attended.unflatten(0, (-1, self.num_heads))  # (batch, heads, height, width, channels)
        attended = attended.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)  # (batch, tokens, heads * channels)
        return self.proj(attended), [height, width]

    def _attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(batch * heads, height, width, channels) each -> the same, with the height and width of `queries`."""
        size, key_size = tuple(queries.shape[1:3]), tuple(keys.shape[1:3])
        window, key_window = size, key_size
        if self.window is not None:
            window = tuple(self.window // step for step in self.pool_q.stride)
            key_window = tuple(self.window // step for step in self.pool_k.stride)
        query_windows = to_windows(queries, window)
        is_image = to_windows(keys.new_ones((1, *key_size, 1)), key_window).flatten(1) > 0  # (windows, keys)
        keys = to_windows(keys, key_window).flatten(1, 2)  # (batch * heads * windows, keys, channels)
        values = to_windows(values, key_window).flatten(1, 2)

        scores = (query_windows.flatten(1, 2) * self.scale) @ keys.transpose(1, 2)
        scores = scores + self._position_scores(query_windows, key_window)
        scores = scores.unflatten(0, (-1, len(is_image)))  # (batch * heads, windows, queries, keys)
        scores = scores.masked_fill(~is_image[:, None], float("-inf")).flatten(0, 1)
        attended = (scores.softmax(dim=-1) @ values).unflatten(1, window)
        return from_windows(attended, size)

    def _position_scores(self, queries: torch.Tensor, key_size: tuple[int, int]) -> torch.Tensor:
        """(windows, height, width, channels) queries -> (windows, queries, keys) scores for distances on both axes."""
        rows = relative_positions(self.rel_pos_h, queries.shape[1], key_size[0])
        columns = relative_positions(self.rel_pos_w, queries.shape[2], key_size[1])
        by_row = torch.einsum("nhwc,hkc->nhwk", queries, rows)
        by_column = torch.einsum("nhwc,wkc->nhwk", queries, columns)
        return (by_row[..., :, None] + by_column[..., None, :]).flatten(3).flatten(1, 2)


def relative_positions(table: torch.Tensor, num_queries: int, num_keys: int) -> torch.Tensor:
    """
    Look up an entry for each pair of a query and a key on one axis.

    Args:
        table: (distances, channels), resized if the axis has another number of distances.
        num_queries: number of queries along the axis.
        num_keys: number of keys along the same length.

    Returns:
        (num_queries, num_keys, channels): the entry for the distance of each query and key.
    """
    distances = 2 * max(num_queries, num_keys) - 1
    if len(table) != distances:
        table = nn.functional.interpolate(table.T[None], size=distances, mode="linear", align_corners=False)[0].T
    query_step, key_step = max(num_keys / num_queries, 1.0), max(num_queries / num_keys, 1.0)
    query_positions = torch.arange(num_queries, device=table.device) * query_step
    key_positions = torch.arange(num_keys, device=table.device) * key_step
    largest = (num_keys - 1) * key_step
    return table[(query_positions[:, None] - key_positions + largest).long()]


def to_windows(maps: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """(maps, height, width, channels) -> (maps * windows, *window, channels), padded with zeros at bottom and right."""
    height, width = maps.shape[1:3]
    maps = nn.functional.pad(maps, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    maps = maps.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return maps.transpose(2, 3).flatten(0, 2)  # (maps, rows, columns, *window, channels) -> (maps * windows, ...)


def from_windows(windows: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(maps * windows, height, width, channels) -> (maps, *size, channels): the reverse of `to_windows`."""
    rows, columns = (-(-length // side) for length, side in zip(size, windows.shape[1:3], strict=True))
    maps = windows.unflatten(0, (-1, rows, columns)).transpose(2, 3)  # (maps, rows, height, columns, width, channels)
    return maps.flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]
