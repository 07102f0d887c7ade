"""Swin in strips gives what transformers' Swin gives."""

import copy

import pytest
import torch
from transformers import AutoBackbone, SwinConfig

from proscale_hf.backbones import swin_strips
from proscale_hf.backbones.loading import make_faster
from proscale_hf.backbones.swin_mlp import LeanSwinMLP
from proscale_hf.backbones.swin_strips import SwinLayerInStrips, SwinPatchMergingInStrips
from proscale_hf.layers.linear import Linear


@pytest.fixture(scope="module")
def backbones():
    """transformers' own, and one with its weights in strips; no weight is 0."""
    torch.manual_seed(0)
    config = SwinConfig(
        embed_dim=8, depths=[2, 2, 3], num_heads=[1, 2, 4], window_size=4, out_features=["stage1", "stage2", "stage3"]
    )
    theirs = AutoBackbone.from_config(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.5)
    ours = copy.deepcopy(theirs)
    make_faster(ours)
    return theirs, ours


def no_strips(*arguments):
    raise AssertionError("transformers' code should have run")


@pytest.mark.parametrize("tokens", [1, 100, 10**9], ids=["one row of windows", "some", "all"])
@pytest.mark.parametrize("size", [(64, 64), (100, 52), (36, 132), (12, 20)])
def test_values(backbones, size, tokens, monkeypatch):
    monkeypatch.setattr(swin_strips, "CPU_TOKENS", tokens)
    theirs, ours = backbones
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, maps = theirs(pixels).feature_maps, ours(pixels).feature_maps
    for one, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_strips_run_at_inference_alone(backbones, monkeypatch):
    monkeypatch.setattr(SwinLayerInStrips, "_attend", no_strips)
    theirs, ours = backbones
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(ours(pixels).feature_maps[-1], theirs(pixels).feature_maps[-1])
    with torch.no_grad(), pytest.raises(AssertionError, match="should have run"):
        ours(pixels)


def test_another_attention_is_left_to_transformers(backbones, monkeypatch):
    monkeypatch.setattr(SwinLayerInStrips, "_attend", no_strips)
    monkeypatch.setattr(backbones[1].config, "_attn_implementation", "eager")
    with torch.no_grad():
        backbones[1](torch.randn(1, 3, 32, 32))


def test_nothing_changes_but_the_way(backbones):
    theirs, ours = backbones
    assert list(ours.state_dict()) == list(theirs.state_dict())
    classes = {type(module) for module in ours.modules()} - {type(module) for module in theirs.modules()}
    assert classes == {SwinLayerInStrips, SwinPatchMergingInStrips, LeanSwinMLP, Linear}
