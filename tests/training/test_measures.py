"""What the plain loop reports, summed and averaged over processes."""

from types import SimpleNamespace

import pytest
import torch


pytest.importorskip("accelerate")

from proscale_hf.training.measures import Averages, count_faults


class TwoProcesses:
    """An accelerator whose other process has the same tensors, each three times as large."""

    device = torch.device("cpu")

    def unwrap_model(self, model):
        return model

    def reduce(self, tensor, reduction="sum"):
        return tensor * {"sum": 4, "mean": 2}[reduction]


def test_losses_are_means_over_steps_and_processes():
    averages = Averages()
    averages.add({"loss": torch.tensor(1.0), "loss_dice": torch.tensor(10.0)})
    averages.add({"loss": torch.tensor(2.0), "loss_dice": torch.tensor(20.0)})
    assert averages.take(TwoProcesses()) == {"loss": 3.0, "loss_dice": 30.0}
    averages.add({"loss": torch.tensor(5.0)})
    assert averages.take(TwoProcesses()) == {"loss": 10.0}


def test_costs_that_are_no_numbers_are_summed_over_processes():
    model = SimpleNamespace(criterion=SimpleNamespace(non_finite_costs=3))
    assert count_faults(TwoProcesses(), model, SimpleNamespace()) == {"non_finite_costs": 12}
    model.criterion.non_finite_costs = 0
    assert count_faults(TwoProcesses(), model, SimpleNamespace(skipped=["a.png", "b.png"])) == {"skipped_images": 2}
