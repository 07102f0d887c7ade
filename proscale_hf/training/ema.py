"""Exponential moving average of the weights, which often segments better than the last weights do."""

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def create_ema(model: nn.Module, decay: float) -> AveragedModel:
    """
    Args:
        model: not wrapped for several processes; its copy is what is averaged.
        decay: the average keeps this share of itself in each update, and less in the first ones, so that the initial
            weights are soon forgotten: (1 + n) / (10 + n) after n updates.

    Returns:
        The average, whose `update_parameters(model)` is to be called after each update, and whose `module` is the
        averaged model. Buffers are the model's own.
    """

    def average(averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        updates = int(updates)
        get_ema_multi_avg_fn(min(decay, (1 + updates) / (10 + updates)))(averaged, current, updates)

    return AveragedModel(model, multi_avg_fn=average).requires_grad_(False).eval()
