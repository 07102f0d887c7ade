"""Feed-forward blocks of transformers' Swin that keep half as much for the backward pass in training.

The second linear layer keeps its input, which is GELU's output, and GELU keeps its input. These are the largest tensors
of the backbone. GELU's input is enough: its output is cheap to compute again.
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation
from transformers.models.swin.modeling_swin import SwinMLP

from proscale_hf.layers.linear import OneDNNLinear, linear, linear_gradients
from proscale_hf.layers.untouched import is_untouched


class LeanSwinMLP(SwinMLP):
    """transformers' `SwinMLP`, which keeps less for the backward pass."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, channels) -> the same."""
        is_gelu = type(self.activation_fn) is GELUActivation and self.activation_fn.act is nn.functional.gelu
        if not (torch.is_grad_enabled() and is_gelu and is_untouched(self)):
            return super().forward(hidden_states)
        expanded = self.fc1(hidden_states)
        output = LinearOfGelu.apply(expanded.flatten(0, -2), self.fc2.weight, self.fc2.bias)
        return output.unflatten(0, expanded.shape[:-1])


class LinearOfGelu(OneDNNLinear):
    """GELU and a linear layer. Only GELU's input is kept, and its output is computed again from that."""

    @staticmethod
    def forward(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """
        Args:
            inputs: (rows, in_features).
            weight: (out_features, in_features); under autocast its type is not that of the inputs.
            bias: (out_features,).

        Returns:
            (rows, out_features), in the inputs' type.
        """
        return linear(nn.functional.gelu(inputs), weight.to(inputs.dtype), bias.to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the arguments."""
        inputs, weight = ctx.saved_tensors
        of_gelu, *others = linear_gradients(gradient, nn.functional.gelu(inputs), weight, ctx.needs_input_grad)
        return None if of_gelu is None else torch.ops.aten.gelu_backward(of_gelu, inputs), *others
