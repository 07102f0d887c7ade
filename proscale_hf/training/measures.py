"""The numbers that a training reports, in the plain loop and in `SegmentationTrainer`.

Losses are means over the steps and processes since the last report:

- `loss`: what is minimised: the terms of all predictions of the mask decoder, each times its weight, summed.
- `loss_cross_entropy`: of a query's class, "no object" included.
- `loss_mask`: binary cross-entropy of a matched mask, at sampled points.
- `loss_dice`: dice loss of a matched mask, at the same points.

The last three are unweighted. They belong to the last prediction, which is the model's result.

Faults do not stop the training. They are counted from its start, or from where it was resumed, and reported if there
are any:

- `non_finite_costs`: costs of matching that were NaN or infinite.
- `skipped_images`: images that could not be used.

An evaluation has a `headline`, the paper's measures; one of them decides which model is best.
"""

import math
import resource
import sys
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch


try:
    from accelerate.utils import gather_object
except ImportError as error:
    raise ImportError('training needs accelerate: pip install "proscale-hf[train]"') from error

from proscale_hf.evaluation.report import MEASURES


LOSS_TERMS = ("loss_cross_entropy", "loss_mask", "loss_dice")
BEST_BY = {"panoptic": "PQ", "instance": "AP", "semantic": "mIoU"}


def loss_terms(outputs: Any) -> dict[str, torch.Tensor]:
    """The model's `loss` and the terms of its last prediction, detached."""
    terms = {"loss": outputs.loss, **{name: outputs.loss_dict[name] for name in LOSS_TERMS}}
    return {name: value.detach().float() for name, value in terms.items()}


def check_finite(loss: float, step: int) -> None:
    """Raises a ValueError if the loss at this step is NaN or infinite."""
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {step}: lower the learning rate")


class Averages:
    """Means over time and over processes. Values stay on their device until somebody asks for the means."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += 1

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means since the last call; all processes must call this together."""
        means = torch.stack(list(self.sums.values())) / self.count
        values = accelerator.reduce(means, "mean").tolist()
        names = list(self.sums)
        self.__init__()
        return dict(zip(names, values, strict=True))


def count_faults(accelerator: Any, model: Any, dataset: Any) -> dict[str, int]:
    """Count `non_finite_costs` and `skipped_images` over all processes; counts of 0 are left out.

    Args:
        accelerator: an `accelerate.Accelerator`; all its processes must call this together.
        model: as the accelerator prepared it, or not prepared.
        dataset: the `SegmentationDataset` that the training reads.
    """
    costs = torch.tensor(accelerator.unwrap_model(model).criterion.non_finite_costs, device=accelerator.device)
    counts = {"non_finite_costs": int(accelerator.reduce(costs)), "skipped_images": len(skipped_images(dataset))}
    return {name: count for name, count in counts.items() if count}


def skipped_images(dataset: Any) -> list[str]:
    """The files of a `SegmentationDataset` that no process could use. All processes must call this together."""
    return sorted(set(gather_object(getattr(dataset, "skipped", []))))


def headline(results: Mapping[str, Any]) -> dict[str, float]:
    """The main numbers of an evaluation by their usual names: PQ, SQ, ..., AP, mIoU; `skipped_images` if any were."""
    numbers = {
        name: float(reduce(lambda level, key: level[key], path, results))
        for name, path in MEASURES.items()
        if path[0] in results
    }
    return numbers | ({"skipped_images": len(results["skipped"])} if results["skipped"] else {})


def best_measure(results: Mapping[str, Any]) -> str:
    """The name of the measure that decides which model is best: that of the first task that was evaluated."""
    return BEST_BY[next(task for task in results if task in BEST_BY)]


def peak_memory(device: torch.device) -> float:
    """The most memory that was in use so far, in gigabytes (1e9 bytes): on the GPU, or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
