"""Exponential moving average of the weights, which often segments better than the last weights do."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def create_ema(model: nn.Module, decay: float, device: torch.device | None = None) -> AveragedModel:
    """
    Args:
        model: not wrapped for several processes; its copy is what is averaged.
        decay: the average keeps this share of itself in each update, and less in the first ones, so that the initial
            weights are soon forgotten: (1 + n) / (10 + n) after n updates.
        device: of the average; the model's if not given.

    Returns:
        The average, whose `update_parameters(model)` is to be called after each update, and whose `module` is the
        averaged model. Buffers are the model's own.
    """

    def average(averaged: list[Tensor], current: list[Tensor], _: Tensor | int) -> None:
        updates = ema.n_averaged.item()
        get_ema_multi_avg_fn(min(decay, (1 + updates) / (10 + updates)))(averaged, current, updates)

    ema = AveragedModel(model, device, multi_avg_fn=average)
    # PyTorch 2.8 looks at the count once for each parameter; on a GPU, each time it would wait for the whole step.
    ema.n_averaged = torch.tensor(0)
    return ema.requires_grad_(False).eval()
