"""Modules of a backbone become faster ones, with their weights."""

import copy

import torch
from torch import nn

from proscale_hf.backbones.loading import make_faster
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
