"""Linear layers whose product on the CPU is oneDNN's.

PyTorch hands a float32 product to MKL, which on AMD's processors reaches about half the speed of oneDNN with several
threads. A bfloat16 one it hands to oneDNN, after copying the bias to every row of the result. Everything else, other
types, devices and compiled graphs, is left to its own choice.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers import initialization as init


MANY_ROWS, MANY_FEATURES = 512, 128  # from where on oneDNN's weight gradients are faster than MKL's
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
HAS_BFLOAT16 = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """
    `nn.functional.linear`.

    Args:
        inputs: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,), or none.

    Returns:
        (..., out_features).
    """
    if not suits_onednn(inputs, weight):
        return nn.functional.linear(inputs, weight, bias)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (inputs, weight, bias)
    ):
        return OneDNNLinear.apply(inputs.flatten(0, -2), weight, bias).unflatten(0, inputs.shape[:-1])
    return product(inputs, weight, bias)


def suits_onednn(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether it is a plain product on the CPU: not under autocast, and not compiled, traced or counted.

    It is float32, or, without gradients, bfloat16: what is saved there is a copy.
    """
    takes_bfloat16 = HAS_BFLOAT16 and not torch.is_grad_enabled()
    return (
        HAS_ONEDNN
        and inputs.device.type == weight.device.type == "cpu"
        and inputs.dtype == weight.dtype
        and (inputs.dtype == torch.float32 or (inputs.dtype == torch.bfloat16 and takes_bfloat16))
        and type(weight) in (nn.Parameter, torch.Tensor)  # no shard, and no quantised weight
        and inputs.ndim > 1
        and inputs.numel() > 0
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not is_in_torch_dispatch_mode()  # such as PyTorch's counter of FLOPs, which knows its own products alone
    )


def product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`inputs @ weight.T + bias`, without autograd."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def linear_gradients(
    gradient: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, needed: tuple[bool, ...]
) -> tuple[torch.Tensor | None, ...]:
    """
    Gradients of [`linear`].

    Args:
        gradient: (rows, out_features), that of the result.
        inputs: (rows, in_features), of the gradient's type.
        weight: (out_features, in_features); under autocast of another type.
        needed: which of the three are wanted.

    Returns:
        Those of inputs, weight and bias, or None; of the gradient's type, which autograd makes theirs.
    """
    for_inputs, for_weight, for_bias = needed
    return (
        linear(gradient, weight.to(gradient.dtype).T) if for_inputs else None,
        weight_gradient(gradient, inputs) if for_weight else None,
        gradient.sum(0) if for_bias else None,
    )


def weight_gradient(gradient: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """`gradient.T @ inputs`: the weight gradient of a convolution by single pixels, where oneDNN's is the faster one.

    Args:
        gradient: (rows, out_features).
        inputs: (rows, in_features).

    Returns:
        (out_features, in_features).
    """
    is_large = len(inputs) >= MANY_ROWS and inputs.shape[1] >= MANY_FEATURES
    if not (is_large and inputs.dtype == torch.float32 and suits_onednn(gradient, inputs)):
        return gradient.T @ inputs
    size = (gradient.shape[1], inputs.shape[1], 1, 1)
    inputs, gradient = (rows[None, None].permute(0, 3, 1, 2) for rows in (inputs, gradient))  # images, channels last
    return nn.grad.conv2d_weight(inputs, size, gradient).flatten(1)


class OneDNNLinear(torch.autograd.Function):
    """[`product`] with its gradients."""

    @staticmethod
    def forward(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Arguments and result as in [`linear`], with one axis of rows."""
        return product(inputs, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        """Keeps what the gradients need."""
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the arguments."""
        return linear_gradients(gradient, *ctx.saved_tensors, ctx.needs_input_grad)


class Linear(nn.Linear):
    """`nn.Linear`, by [`linear`]."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(inputs, self.weight, self.bias)


class UniformLinear(Linear):
    """A linear layer that begins as PyTorch's own do, as in the originals' heads; models begin others differently."""

    def reset_parameters(self) -> None:
        """Uniform weights and biases, up to one over the root of the number of inputs."""
        bound = 1 / math.sqrt(self.in_features)
        init.uniform_(self.weight, -bound, bound)
        init.uniform_(self.bias, -bound, bound)


class ZeroLinear(Linear):
    """A linear layer that puts out zeros at first."""

    def reset_parameters(self) -> None:
        """All zero."""
        init.zeros_(self.weight)
        init.zeros_(self.bias)
