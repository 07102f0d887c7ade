"""What losses are divided by, when several processes train together."""

import torch


def sum_over_processes(totals: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    Add up numbers over all processes.

    A loss that is divided by the sum, and multiplied by the number of processes, has as its mean over the processes
    what it would be for the joint batch. So has its gradient, since processes average gradients.

    Args:
        totals: of this process; changed in place.

    Returns:
        The sums over all processes, and how many processes there are.
    """
    processes = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(totals)
        processes = torch.distributed.get_world_size()
    return totals, processes
