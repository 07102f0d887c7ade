"""Sine position embeddings of maps and of boxes."""

import math

import torch

from proscale_hf.layers.position_embedding import sine_box_embedding, sine_position_embedding


def test_the_temperature_sets_the_longest_wavelength():
    embedding = sine_position_embedding(4, 6, 16, torch.device("cpu"), temperature=20.0)
    assert embedding.shape == (1, 16, 4, 6)
    slowest = 20.0 ** (-6 / 8)  # of four frequencies for each axis
    angles = torch.arange(1, 5) / 4 * 2 * math.pi * slowest
    torch.testing.assert_close(embedding[0, 6, :, 0], angles.sin(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embedding[0, 7, :, 3], angles.cos(), atol=1e-5, rtol=1e-5)
    usual = sine_position_embedding(4, 6, 16, torch.device("cpu"))
    torch.testing.assert_close(usual, sine_position_embedding(4, 6, 16, torch.device("cpu"), temperature=10_000.0))
    assert (usual - embedding).abs().max() > 0.1


def test_a_box_is_embedded_number_by_number_with_y_first():
    box = torch.tensor([0.1, 0.2, 0.3, 0.4])  # x, y, width, height
    embedding = sine_box_embedding(box, 8).view(4, 8)
    for row, number in zip(embedding, (0.2, 0.1, 0.3, 0.4), strict=True):
        angles = number * 2 * math.pi * 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
        torch.testing.assert_close(row[0::2], angles.sin())
        torch.testing.assert_close(row[1::2], angles.cos())
