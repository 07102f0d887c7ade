"""Sine position embeddings, as in DETR (https://arxiv.org/abs/2005.12872): of maps, and of boxes."""

import math

import torch


TEMPERATURE = 10_000.0
EPSILON = 1e-6


def sine_position_embedding(
    height: int,
    width: int,
    channels: int,
    device: torch.device,
    valid_sizes: torch.Tensor | None = None,
    temperature: float = TEMPERATURE,
) -> torch.Tensor:
    """Embed each position's row and column, counted from 1 and scaled so that the last one is 2 pi.

    Args:
        height: rows of the map.
        width: columns of the map.
        channels: channels of the embedding, a multiple of 4: the first half embeds rows, the second columns.
        device: where to put it.
        valid_sizes: (batch, 2) rows and columns of the map that are image; the whole map if None.
        temperature: ratio of the longest wavelength to the shortest one.

    Returns:
        (batch, channels, height, width) float32; batch is 1 without `valid_sizes`.
    """
    if valid_sizes is None:
        valid_sizes = torch.tensor([[height, width]], device=device)
    frequency = frequencies(channels // 2, temperature, device)

    def embed_axis(length: int, valid_lengths: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(1, length + 1, device=device, dtype=torch.float32)
        phase = steps / (valid_lengths[:, None] + EPSILON) * (2 * math.pi)  # (batch, length)
        angle = phase[:, None] * frequency[:, None]  # (batch, half / 2, length)
        return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1, 2)  # (batch, half, length)

    rows = embed_axis(height, valid_sizes[:, 0])[..., None].expand(-1, -1, height, width)
    columns = embed_axis(width, valid_sizes[:, 1])[:, :, None].expand(-1, -1, height, width)
    return torch.cat((rows, columns), dim=1)


def sine_box_embedding(boxes: torch.Tensor, channels: int) -> torch.Tensor:
    """Embed the four numbers of boxes, each scaled so that 1 is 2 pi (DAB-DETR, https://arxiv.org/abs/2201.12329).

    Args:
        boxes: (..., 4), x and y of the centre, width and height, as shares of the image.
        channels: for each number, even.

    Returns:
        (..., 4 * channels) of the boxes' type, of y, x, width and height in this order.
    """
    angle = boxes[..., [1, 0, 2, 3], None] * (2 * math.pi) * frequencies(channels, TEMPERATURE, boxes.device)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-3)


def frequencies(channels: int, temperature: float, device: torch.device) -> torch.Tensor:
    """(channels / 2,) float32, of the sines and cosines that embed a number in so many channels."""
    return temperature ** (-2 * torch.arange(channels // 2, device=device, dtype=torch.float32) / channels)
