"""The exponential moving average of the weights."""

import pytest
import torch
from torch import nn

from proscale_hf.training.ema import create_ema


def model_and_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    return model, [torch.randn(2, 3) for _ in range(5)]


@pytest.mark.parametrize("decay", [0.05, 0.2, 0.999])
def test_the_average_follows_the_formula(decay):
    model, weights = model_and_weights()
    ema = create_ema(model, decay)
    expected = None
    for updates, weight in enumerate(weights):
        with torch.no_grad():
            model[0].weight.copy_(weight)
        ema.update_parameters(model)
        share = min(decay, (1 + updates) / (10 + updates))
        expected = weight if expected is None else share * expected + (1 - share) * weight
    torch.testing.assert_close(ema.module[0].weight, expected)
    torch.testing.assert_close(model[0].weight, weights[-1])


def test_buffers_are_the_models_own():
    model, _ = model_and_weights()
    ema = create_ema(model, 0.9)
    for _ in range(3):
        model(torch.randn(4, 3) + 5)
        ema.update_parameters(model)
    assert torch.equal(ema.module[1].running_mean, model[1].running_mean)
    assert ema.module[1].num_batches_tracked == 3


def test_an_update_does_not_wait_for_the_device():
    model, _ = model_and_weights()
    ema = create_ema(model, 0.9, torch.device("meta"))  # which has no values that could be asked for
    for _ in range(2):
        ema.update_parameters(model)
    assert ema.module[0].weight.is_meta and ema.n_averaged == 2


def test_the_average_is_for_evaluation_and_takes_no_gradient():
    model, _ = model_and_weights()
    ema = create_ema(model, 0.9)
    assert not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_restored_average_goes_on_as_before(tmp_path):
    model, weights = model_and_weights()
    averages = [create_ema(model, 0.9), create_ema(model, 0.9)]
    for step, weight in enumerate(weights):
        with torch.no_grad():
            model[0].weight.copy_(weight)
        averages[0].update_parameters(model)
        if step < 3:
            averages[1].update_parameters(model)
        elif step == 3:
            torch.save(averages[0].state_dict(), tmp_path / "ema.pt")
            averages[1].load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
        else:
            averages[1].update_parameters(model)
    assert torch.equal(averages[0].module[0].weight, averages[1].module[0].weight)
