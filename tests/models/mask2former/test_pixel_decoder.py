"""The pixel decoder: what the kinds of per-pixel embedding compute, and the order of the maps."""

import pytest
import torch
from torch import nn

from helpers import tiny_config
from proscale_hf.models.mask2former.pixel_decoder import PixelDecoder


CHANNELS = [8, 12, 16, 24]


def backbone_maps(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn((2, channels, 16 >> level, 24 >> level), generator=generator)
        for level, channels in enumerate(CHANNELS)
    )


def neighbours(feature_map: torch.Tensor, outside: float) -> torch.Tensor:
    """(batch, channels, height, width) -> (9, batch, channels, height, width): each position's 3x3 surroundings."""
    height, width = feature_map.shape[-2:]
    padded = nn.functional.pad(feature_map, (1, 1, 1, 1), value=outside)
    return torch.stack([padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3)])


@pytest.mark.parametrize("kind", ["maxpool", "avgpool", "conv"])
def test_pixel_embedding(kind):
    torch.manual_seed(0)
    decoder = PixelDecoder(tiny_config(pixel_embedding=kind), CHANNELS).eval()
    seen = []
    decoder.layer_1[0].register_forward_hook(lambda _, arguments, output: seen.extend((arguments[0], output)))
    output = decoder(backbone_maps())
    given, result = seen
    lateral = decoder.adapter_1(backbone_maps()[0])
    finest = nn.functional.interpolate(output.multi_scale_features[2], size=(16, 24), mode="bilinear")
    torch.testing.assert_close(given, lateral + finest)
    if kind == "maxpool":
        expected = neighbours(given, float("-inf")).amax(0)
    elif kind == "avgpool":
        expected = neighbours(given, 0.0).sum(0) / 9  # what lies outside counts as 0
    else:
        weight = decoder.layer_1[0].weight.flatten(2)  # (out, in, 9)
        expected = torch.einsum("nbihw,oin->bohw", neighbours(given, 0.0), weight)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert output.mask_features.shape == (2, 16, 16, 24)


def test_without_a_map_of_its_own_the_per_pixel_embedding_is_a_projection_of_the_finest_map():
    config = tiny_config(pixel_embedding="none", feature_strides=(8, 16, 32), common_stride=8)
    decoder = PixelDecoder(config, CHANNELS[1:]).eval()
    output = decoder(backbone_maps()[1:])
    assert [m.shape[-2:] for m in output.multi_scale_features] == [(2, 3), (4, 6), (8, 12)]
    torch.testing.assert_close(output.mask_features, decoder.mask_projection(output.multi_scale_features[-1]))


def test_maps_come_out_coarse_to_fine():
    decoder = PixelDecoder(tiny_config(), CHANNELS).eval()
    assert [m.shape[-2:] for m in decoder(backbone_maps()).multi_scale_features] == [(2, 3), (4, 6), (8, 12)]


def test_the_light_pixel_embedding_has_no_weights_but_its_norms():
    light, conv = (PixelDecoder(tiny_config(pixel_embedding=kind), CHANNELS) for kind in ("maxpool", "conv"))
    sizes = [sum(p.numel() for p in decoder.layer_1.parameters()) for decoder in (light, conv)]
    assert sizes == [2 * 32, 2 * 32 + 9 * 32 * 32]
