"""Swin's feed-forward blocks give what transformers' give, and keep less of it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import SwinConfig
from transformers.models.swin.modeling_swin import SwinMLP

from helpers import tiny_model
from proscale_hf.backbones import swin_mlp
from proscale_hf.backbones.loading import make_faster
from proscale_hf.backbones.swin_mlp import LeanSwinMLP, LinearOfGelu


@pytest.fixture
def blocks():
    """transformers' own, and ours with its weights."""
    torch.manual_seed(0)
    theirs = nn.Sequential(SwinMLP(SwinConfig(), 16))
    ours = copy.deepcopy(theirs)
    make_faster(ours)
    assert type(ours[0]) is LeanSwinMLP and list(ours.state_dict()) == list(theirs.state_dict())
    return theirs, ours


def test_the_model_takes_them():
    classes = {type(module) for module in tiny_model().model.modules()}
    assert LeanSwinMLP in classes and SwinMLP not in classes


def results(block, run=lambda block, inputs: block(inputs)):
    """Output and gradients, and the bytes kept for the latter."""
    torch.manual_seed(1)
    inputs, gradient = torch.randn(2, 400, 16, requires_grad=True), torch.randn(2, 400, 16)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run(block, inputs)
    gradients = torch.autograd.grad(output, [inputs, *block.parameters()], gradient.to(output.dtype))
    return [output, *gradients], sum(kept.values())


def test_values_gradients_and_what_is_kept(blocks):
    (expected, kept), (given, kept_by_ours) = map(results, blocks)
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert kept - kept_by_ours == 2 * 400 * 64 * 4


def test_autocast(blocks):
    def run(block, inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return block(inputs)

    (expected, kept), (given, kept_by_ours) = (results(block, run) for block in blocks)
    for one, other in zip(given, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * other.abs().max().item())
    assert kept_by_ours < kept


def test_gradient_checkpointing(blocks):
    def run(block, inputs):
        return checkpoint(block, inputs, use_reentrant=False)

    for one, other in zip(results(blocks[1], run)[0], results(blocks[0])[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_second_derivatives():
    arguments = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (2, 4), (2,))]
    assert torch.autograd.gradgradcheck(LinearOfGelu.apply, arguments)


@pytest.mark.parametrize("frozen", ["fc1.weight", "fc2.weight", "fc2.bias"])
def test_frozen_weights(blocks, frozen):
    blocks[1][0].get_parameter(frozen).requires_grad_(False)
    blocks[1](torch.randn(1, 5, 16)).sum().backward()
    assert {name for name, weight in blocks[1][0].named_parameters() if weight.grad is None} == {frozen}


def test_what_is_left_to_transformers(blocks, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("transformers' code should have run")

    monkeypatch.setattr(LinearOfGelu, "apply", refuse)
    block, inputs = blocks[1], torch.randn(1, 5, 16)
    with pytest.raises(AssertionError, match="should have run"):
        block(inputs)
    expected = blocks[0](inputs)
    with torch.no_grad():
        torch.testing.assert_close(block(inputs), expected)
    seen = []
    hook = block[0].fc2.register_forward_hook(lambda layer, arguments, output: seen.append(arguments[0].shape))
    torch.testing.assert_close(block(inputs), expected)
    assert seen == [(1, 5, 64)]
    hook.remove()
    block[0].fc2 = nn.Sequential(block[0].fc2)  # as an adapter does
    torch.testing.assert_close(block(inputs), expected)
    block[0].fc2 = block[0].fc2[0]
    for activation in (nn.ReLU(), swin_mlp.GELUActivation(use_gelu_python=True)):
        block[0].activation_fn = activation
        block(inputs)
