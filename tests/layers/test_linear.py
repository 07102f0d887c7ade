"""Linear layers in oneDNN: values and gradients are those of `nn.functional.linear`, and the others are left alone."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from proscale_hf.layers.linear import (
    HAS_BFLOAT16,
    HAS_ONEDNN,
    Linear,
    OneDNNLinear,
    linear,
    suits_onednn,
    weight_gradient,
)


pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="PyTorch without oneDNN")


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (2, 3, 4, 7)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients(shape, has_bias):
    torch.manual_seed(0)
    inputs, weight = torch.randn(shape, requires_grad=True), torch.randn(6, 7, requires_grad=True)
    bias = torch.randn(6, requires_grad=True) if has_bias else None
    arguments = [argument for argument in (inputs, weight, bias) if argument is not None]
    assert suits_onednn(inputs, weight)
    ours, theirs = linear(inputs, weight, bias), nn.functional.linear(inputs, weight, bias)
    torch.testing.assert_close(ours, theirs)
    gradient = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad(ours, arguments, gradient), torch.autograd.grad(theirs, arguments, gradient), strict=True
    ):
        torch.testing.assert_close(one, other)
    with torch.inference_mode():
        torch.testing.assert_close(linear(inputs, weight, bias), theirs)


@pytest.mark.parametrize("rows", [40, 700])
def test_weight_gradients_few_and_many(rows):
    inputs, gradient = torch.randn(rows, 130), torch.randn(rows, 9)
    for of_output in (gradient, gradient[:1].expand(rows, 9), torch.randn(9, rows).T):
        expected = (of_output.double().T @ inputs.double()).float()
        ours = weight_gradient(of_output, inputs)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
        assert ours.is_contiguous()


def test_what_is_not_contiguous():
    tokens, weight = torch.randn(2, 50, 8)[:, 10:30], torch.randn(8, 5).T
    torch.testing.assert_close(linear(tokens, weight), nn.functional.linear(tokens, weight))


def test_a_result_may_be_changed_in_place():
    layer, inputs = Linear(4, 3), torch.randn(2, 5, 4)
    linear(inputs, layer.weight, layer.bias).relu_().sum().backward()
    expected = torch.autograd.grad(nn.functional.linear(inputs, layer.weight, layer.bias).relu().sum(), layer.weight)
    torch.testing.assert_close(layer.weight.grad, expected[0])


def test_second_derivatives():
    arguments = [torch.randn(shape, requires_grad=True) for shape in ((3, 4), (2, 4), (2,))]
    first = torch.autograd.grad(OneDNNLinear.apply(*arguments).square().sum(), arguments[0], create_graph=True)[0]
    reference = torch.autograd.grad(nn.functional.linear(*arguments).square().sum(), arguments[0], create_graph=True)[0]
    for one, other in zip(
        torch.autograd.grad(first.sum(), arguments[:2]),
        torch.autograd.grad(reference.sum(), arguments[:2]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(not HAS_BFLOAT16, reason="a processor without bfloat16")
@pytest.mark.parametrize("has_bias", [True, False])
def test_bfloat16_without_gradients(has_bias):
    inputs, weight, bias = (torch.randn(shape).bfloat16() for shape in ((2, 70, 48), (40, 48), (40,)))
    bias = bias if has_bias else None
    with torch.no_grad():
        assert suits_onednn(inputs, weight)
        assert torch.equal(linear(inputs, weight, bias), nn.functional.linear(inputs, weight, bias))
    assert not suits_onednn(inputs, weight) and not suits_onednn(inputs, weight.float())


def test_what_is_left_to_pytorch():
    inputs, weight = torch.randn(2, 3), torch.randn(4, 3)
    for dtype in (torch.float64, torch.bfloat16):
        assert not suits_onednn(inputs.to(dtype), weight.to(dtype))
    assert not suits_onednn(inputs[:0], weight) and linear(inputs[:0], weight).shape == (0, 4)
    assert not suits_onednn(inputs[0], weight) and linear(inputs[0], weight).shape == (4,)
    assert not suits_onednn(inputs.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not suits_onednn(inputs, weight) and linear(inputs, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not suits_onednn(inputs, weight)
    with FlopCounterMode(display=False) as counter:
        linear(inputs, weight)
    assert counter.get_total_flops() == 2 * 2 * 3 * 4
    assert suits_onednn(inputs, weight)
