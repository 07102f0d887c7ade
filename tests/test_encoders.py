"""The encoders behind their common contract, and what PRO-SCALE's stages and re-calibration do."""

import pytest
import torch
from torch import nn

from helpers import tiny_config
from proscale_hf.encoder_proscale import ProScaleEncoder, TokenRecalibration
from proscale_hf.encoders import ENCODER_CLASSES


SHAPES = [(2, 3), (4, 6), (8, 12)]


def maps(channels: int = 32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((2, channels, height, width), generator=generator) for height, width in SHAPES]


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.mark.parametrize("encoder", sorted(ENCODER_CLASSES))
def test_contract(encoder):
    module = randomized(ENCODER_CLASSES[encoder](tiny_config(encoder=encoder)))
    output = module(maps(), [m[:1] for m in maps(seed=1)])
    assert [m.shape for m in output] == [m.shape for m in maps()]
    alone = module([m[1:] for m in maps()], [m[:1] for m in maps(seed=1)])
    for together, single in zip(output, alone, strict=True):
        torch.testing.assert_close(together[1:], single, rtol=1e-4, atol=1e-5)


def test_levels_seen_grow_with_the_stages():
    encoder = ProScaleEncoder(tiny_config(encoder_stage_layers=(2, 1, 3)))
    assert [layer.self_attn.num_levels for layer in encoder.layers] == [1, 1, 2, 3, 3, 3]
    lengths = []
    for layer in encoder.layers:
        layer.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    encoder(maps(), maps())
    assert lengths == [6, 6, 30, 126, 126, 126]


@pytest.mark.parametrize("recalibration", ["none", "linear"])
def test_the_finest_map_enters_early_stages_only_through_recalibration(recalibration):
    """With a last stage that is cut off, the coarse maps depend on the finest one just by the re-calibration."""
    encoder = randomized(
        ProScaleEncoder(tiny_config(encoder_stage_layers=(1, 1, 1), token_recalibration=recalibration))
    )
    entering = []
    encoder.layers[1].register_forward_hook(lambda module, arguments, output: entering.append(output))
    changed = [*maps()[:2], maps(seed=7)[2]]
    encoder(maps(), maps(seed=1))
    encoder(changed, maps(seed=1))
    assert torch.equal(*entering) is (recalibration == "none")


def test_stage_residual_adds_the_stage_input_after_each_layer_but_in_the_last_stage():
    plain = randomized(ProScaleEncoder(tiny_config(encoder_stage_layers=(1, 1, 1))))
    residual = randomized(ProScaleEncoder(tiny_config(encoder_stage_layers=(1, 1, 1), stage_residual=True)))
    inputs, outputs = [], []
    for layer in residual.layers:
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        layer.register_forward_hook(lambda _, arguments, output: outputs.append(output))
    last = residual(maps(), maps(seed=1))
    torch.testing.assert_close(inputs[1][:, :6], outputs[0] + inputs[0])
    torch.testing.assert_close(inputs[2][:, :30], outputs[1] + inputs[1])
    torch.testing.assert_close(last[0].flatten(2).transpose(1, 2), outputs[2][:, :6])
    assert (plain(maps(), maps(seed=1))[0] - last[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_recalibration_is_the_papers_equation(kind):
    config = tiny_config(token_recalibration=kind, token_recalibration_temperature=0.5)
    module = randomized(TokenRecalibration(config))
    coarse, _, finest = maps()
    resized = nn.functional.interpolate(finest, size=(2, 3), mode="bilinear", align_corners=False)
    weight = module.projection.weight.flatten()
    logits = torch.einsum("bchw,c->bhw", resized, weight) + module.projection.bias
    torch.testing.assert_close(module(coarse, finest), coarse * (0.5 * logits).sigmoid()[:, None])


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_original_layout_mixes_positions_and_channels(kind):
    settings = {"token_recalibration": kind, "token_recalibration_temperature": 1.0}
    paper = randomized(TokenRecalibration(tiny_config(**settings)))
    original = randomized(TokenRecalibration(tiny_config(**settings, token_recalibration_layout="original")))
    coarse, _, finest = maps()
    result = original(coarse, finest)
    assert result.shape == coarse.shape
    assert (result - paper(coarse, finest)).abs().max() > 1e-2
    constant = torch.full_like(finest, 0.7)  # where all values are the same there is nothing to mix
    torch.testing.assert_close(original(coarse, constant), paper(coarse, constant))


def test_four_scales():
    config = tiny_config()
    config.encoder_stage_layers = (1, 1, 1, 2)
    encoder = randomized(ProScaleEncoder(config))
    finest = torch.randn(2, 32, 16, 24)
    output = encoder([*maps(), finest], [*maps(), finest])
    assert output[3].shape == (2, 32, 16, 24)
