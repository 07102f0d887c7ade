"""What says which class a query has, and how its box changes."""

import math

from torch import nn
from transformers import initialization as init

from proscale_hf.layers.linear import UniformLinear, ZeroLinear


PRIOR = 0.01  # the probability that a class has at first: most queries have no object


class ClassHead(UniformLinear):
    """(..., channels) -> (..., classes), a logit for each class; none stands for "no object"."""

    def reset_parameters(self) -> None:
        """As PyTorch's own layers, but for the bias: each class has the probability `PRIOR`."""
        super().reset_parameters()
        init.constant_(self.bias, -math.log((1 - PRIOR) / PRIOR))


class BoxHead(nn.Sequential):
    """(..., channels) -> (..., 4), how the logits of a box change; at first, not at all.

    Args:
        channels: of the queries.
    """

    def __init__(self, channels: int):
        super().__init__(
            UniformLinear(channels, channels),
            nn.ReLU(),
            UniformLinear(channels, channels),
            nn.ReLU(),
            ZeroLinear(channels, 4),
        )
