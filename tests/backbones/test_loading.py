"""Modules of a backbone become faster ones, with their weights."""

import copy
import re

import pytest
import torch
from torch import nn

from helpers import TINY_RESNET, TINY_SWIN, pixels, tiny_model
from proscale_hf.backbones.loading import check_strides, make_faster
from proscale_hf.layers.linear import Linear


def test_linear_layers_become_ours():
    layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2, bias=False)))
    inputs = torch.randn(2, 3)
    expected, names = layers(inputs), list(layers.state_dict())
    make_faster(layers)
    assert type(layers[0]) is type(layers[2][0]) is Linear and list(layers.state_dict()) == names
    torch.testing.assert_close(layers(inputs), expected)
    copied = copy.deepcopy(layers)  # an average of the weights is such a copy
    with torch.no_grad():
        copied[0].weight.zero_()
    torch.testing.assert_close(layers(inputs), expected)


@pytest.mark.parametrize("backbone", [TINY_RESNET, TINY_SWIN], ids=["resnet", "swin"])
def test_maps_of_other_strides_than_declared_are_refused(backbone):
    """Whatever the image's size; and right ones are not."""
    for strides, size in (((4, 8, 16, 32), (64, 96)), ((4, 8, 16, 32), (61, 93)), ((4, 8, 16, 64), (64, 96))):
        model = tiny_model(backbone_config=dict(backbone), feature_strides=strides)
        if strides[-1] == 32:
            model(pixels(1, *size))
            continue
        said = re.escape("strides of about [4, 8, 16, 32], but `feature_strides` says [4, 8, 16, 64]")
        with pytest.raises(ValueError, match=said) as caught:
            model(pixels(1, *size))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("length", "is_right"), [(15, True), (16, True), (14, False), (17, False), (8, False), (32, False)]
)
def test_a_side_is_rounded_down_or_up(length, is_right):
    maps = [torch.zeros(1, 2, 16, length)]
    if is_right:
        check_strides(maps, (64, 62), [4])
    else:
        with pytest.raises(ValueError, match=r"`feature_strides` says \[4\]"):
            check_strides(maps, (64, 62), [4])
