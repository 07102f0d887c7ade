"""Exponential moving average of the weights, which often segments better than the last weights do."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def create_ema(model: nn.Module, decay: float, device: torch.device | None = None) -> AveragedModel:
    """
    Start the average of a model's weights.

    Args:
        model: the model, not wrapped for several processes. The average is a copy of it.
        decay: the share of itself that the average keeps in each update. In the first updates it keeps less, so that
            the initial weights are soon forgotten: (1 + n) / (10 + n) after n updates.
        device: where the average is; by default where the model is.

    Returns:
        The average. Call its `update_parameters(model)` after each update; its `module` is the averaged model. Its
        buffers are not averaged: they are the model's.
    """

    def average(averaged: list[Tensor], current: list[Tensor], _: Tensor | int) -> None:
        updates = ema.n_averaged.item()
        get_ema_multi_avg_fn(min(decay, (1 + updates) / (10 + updates)))(averaged, current, updates)

    ema = AveragedModel(model, device, multi_avg_fn=average)
    # PyTorch 2.8 looks at the count once for each parameter; on a GPU, each time it would wait for the whole step.
    ema.n_averaged = torch.tensor(0)
    return ema.requires_grad_(False).eval()
