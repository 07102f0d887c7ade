"""The order of training images: it depends on the seed alone, and can be entered at any step."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from proscale_hf.data.collate import TransformedDataset, collate
from proscale_hf.training.recipe import Recipe


def training_batches(
    dataset: TransformedDataset, recipe: Recipe, device_batch_size: int, first_step: int, rank: int, processes: int
) -> Iterator[dict[str, Any]]:
    """
    Give batches without end. Each epoch is shuffled anew. Its last images are left out if they are too few for an
    update.

    The images of an update do not depend on the number of processes, if `device_batch_size` times that number is the
    recipe's batch size.

    Args:
        dataset: images, see `proscale_hf.training.setup.training_set`; it has enough of them for an update.
        recipe: it gives batch size, seed and workers.
        device_batch_size: images per batch.
        first_step: updates that were done before.
        rank: number of this process.
        processes: how many train together.

    Yields:
        The model's inputs, on the CPU.
    """
    batch_size = recipe.optimization.batch_size
    steps_of_epoch = len(dataset) // batch_size
    order = DistributedSampler(dataset, processes, rank, seed=recipe.seed, drop_last=True)
    share = batch_size // processes
    first_epoch, first_step = divmod(first_step, steps_of_epoch)
    for epoch in count(first_epoch):
        order.set_epoch(epoch)
        dataset.set_epoch(epoch)
        yield from DataLoader(
            dataset,
            sampler=list(order)[first_step * share : steps_of_epoch * share],
            batch_size=device_batch_size,
            num_workers=recipe.workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # so that the loader takes nothing from the model's random numbers
        )
        first_step = 0
