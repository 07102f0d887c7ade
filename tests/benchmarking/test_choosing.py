"""Choosing the encoder's layers: costs of all configurations, times of some, and what fits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import tiny_config, tiny_model
from proscale_hf.benchmarking.choosing import ForwardTimer, choose, count_costs, fit_times
from proscale_hf.benchmarking.comparison import relative_spread
from proscale_hf.cost import measure_cost


@pytest.fixture
def clockwork(monkeypatch) -> list:
    """Forward passes take 10 ms, and 1, 2 and 4 ms for each layer of the three stages; returns the passes taken."""
    taken = []

    def milliseconds(timer: ForwardTimer, stages: tuple[int, ...]) -> float:
        taken.append(stages)
        return 10 + float(np.dot(stages, (1, 2, 4)))

    monkeypatch.setattr(ForwardTimer, "milliseconds", milliseconds)
    return taken


def layers(choices: list) -> list[tuple[int, ...]]:
    return [choice.encoder_stage_layers for choice in choices]


@pytest.mark.parametrize("stages", [(1, 1, 1), (3, 2, 4), (4, 4, 4)])
def test_costs_follow_from_one_layer_more_in_each_stage(stages):
    costs = count_costs(tiny_config(), 60, 100, max_layers=4)
    assert len(costs) == 64
    cost = measure_cost(tiny_config(encoder_stage_layers=stages), 60, 100)
    assert costs[stages] == pytest.approx((cost.total_gflops, cost.encoder_gflops, cost.parameters_millions))


def test_fitted_times():
    times = {stages: 10 + float(np.dot(stages, (1, 2, 4))) for stages in ((1, 1, 1), (4, 1, 1), (1, 4, 1), (1, 1, 4))}
    assert fit_times(times, [(2, 3, 4)]) == {(2, 3, 4): pytest.approx(34)}
    times[1, 1, 4] = 0.1  # noise must not make more layers cheaper
    fitted = fit_times(times, [(2, 3, 1), (2, 3, 4)])
    assert 0 < fitted[2, 3, 1] <= fitted[2, 3, 4]


def test_a_budget_of_gflops(clockwork):
    config = tiny_config()
    costs = {stages: total for stages, (total, *_) in count_costs(config, 64, 96, 3).items()}
    limit = costs[1, 1, 3]
    lines = []
    choices = choose(config, 64, 96, gflops=limit, max_layers=3, timed=2, report=lines.append)
    assert set(layers(choices)) == {stages for stages, total in costs.items() if total <= limit}
    full = [choice for choice in choices if choice.is_full]
    assert choices[: len(full)] == full  # these come first
    for group in (full, choices[len(full) :]):
        totals = [choice.total_gflops for choice in group]
        assert totals == sorted(totals, reverse=True)
    for choice in choices:
        grown = [
            tuple(layers + (stage == grows) for stage, layers in enumerate(choice.encoder_stage_layers))
            for grows in range(3)
        ]
        assert choice.is_full == (not set(grown) & set(layers(choices)))
        assert choice.total_gflops == costs[choice.encoder_stage_layers]
        assert choice.milliseconds == pytest.approx(10 + np.dot(choice.encoder_stage_layers, (1, 2, 4)))
    measured = {choice.encoder_stage_layers for choice in choices if choice.spread is not None}
    assert measured == set(layers(choices)[:2]) | ({(1, 1, 1), (3, 1, 1), (1, 3, 1), (1, 1, 3)} & set(layers(choices)))
    assert len(lines) == 1 and lines[0].startswith("timing ") and lines[0].endswith(" s")


def test_few_that_fit_are_all_measured_and_nothing_else(clockwork):
    costs = count_costs(tiny_config(), 64, 96, 2)
    choices = choose(tiny_config(), 64, 96, gflops=costs[2, 1, 1][0], max_layers=2, rounds=3)
    assert layers(choices) == [(2, 1, 1), (1, 1, 1)] and all(choice.spread == 0 for choice in choices)
    assert clockwork[2:] == [(2, 1, 1), (1, 1, 1)] * 3  # in turns, after two to warm up


def test_a_budget_of_time(clockwork):
    choices = choose(tiny_config(), 64, 96, milliseconds=22.5, max_layers=3, timed=1)
    times = {stages: 10 + np.dot(stages, (1, 2, 4)) for stages in np.ndindex(4, 4, 4) if min(stages) > 0}
    assert set(layers(choices)) == {stages for stages, time in times.items() if time <= 22.5}
    assert all(choice.milliseconds == pytest.approx(times[choice.encoder_stage_layers]) for choice in choices)
    assert choices[0].is_full and choices[0].spread == 0


def test_both_budgets(clockwork):
    limit = count_costs(tiny_config(), 64, 96, 3)[3, 1, 1][0]
    both = choose(tiny_config(), 64, 96, gflops=limit, milliseconds=18.5, max_layers=3)
    assert set(layers(both)) == {(1, 1, 1), (2, 1, 1)}


def test_what_is_measured_counts_more_than_an_estimate(monkeypatch):
    """(2, 2, 2) takes longer here than its layers let one expect."""
    monkeypatch.setattr(ForwardTimer, "milliseconds", lambda _, stages: 99.0 if stages == (2, 2, 2) else 10.0)
    assert (2, 2, 2) not in layers(choose(tiny_config(), 64, 96, milliseconds=50, max_layers=2, timed=1))


def test_spread_is_that_of_the_times(monkeypatch):
    times = iter([0.0] * 2 + [8.0, 10.0, 12.0] * 2)  # two to warm up, then (2, 1, 1) and (1, 1, 1) in turns
    monkeypatch.setattr(ForwardTimer, "milliseconds", lambda *_: next(times))
    limit = count_costs(tiny_config(), 64, 96, 2)[2, 1, 1][0]
    first, second = choose(tiny_config(), 64, 96, gflops=limit, max_layers=2, rounds=3)
    assert (first.milliseconds, second.milliseconds) == (10, 10)  # of 8, 12, 10 and of 10, 8, 12
    assert first.spread == second.spread == pytest.approx(relative_spread([8.0, 10.0, 12.0])) != 0


def test_a_pass_begins_and_ends_on_the_device():
    """What a GPU has yet to do before must not count, and what it has yet to do after must."""
    timer = ForwardTimer(tiny_config(), 64, 96, 1, lambda model: None)
    events = []
    timer.clock = SimpleNamespace(synchronize=lambda: events.append("synchronize"))
    timer.model = lambda pixel_values: events.append("forward")
    timer.model.model = SimpleNamespace(
        pixel_level_module=SimpleNamespace(decoder=SimpleNamespace(encoder=SimpleNamespace()))
    )
    timer.milliseconds((1, 1, 1))
    assert events == ["synchronize", "forward", "synchronize"]


def test_budgets_that_are_too_small(clockwork):
    with pytest.raises(
        ValueError, match=r"nothing fits 1e-06 GFLOPs at 64 x 96: the smallest, \(1, 1, 1\), takes 0\.0"
    ):
        choose(tiny_config(), 64, 96, gflops=1e-6)
    assert not clockwork
    with pytest.raises(ValueError, match=r"nothing fits 5 ms at 64 x 96: the smallest, \(1, 1, 1\), takes 17 ms"):
        choose(tiny_config(), 64, 96, milliseconds=5)


@pytest.mark.parametrize("arguments", [{"max_layers": 0}, {"max_layers": 13}, {"timed": 0}, {"rounds": 0}])
def test_impossible_arguments(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        choose(tiny_config(), 64, 96, **arguments)


def test_other_encoders_have_no_stages():
    with pytest.raises(ValueError, match="only the encoder 'proscale'"):
        choose(tiny_config(encoder="mask2former"), 64, 96, gflops=1)


def test_the_timed_model_has_the_layers_of_the_configuration():
    """What it computes is what a model of that configuration computes with the same weights."""
    weights = tiny_model(encoder_stage_layers=(3, 3, 3)).state_dict()
    timer = ForwardTimer(tiny_config(), 60, 90, 3, lambda model: model.load_state_dict(weights))
    assert timer.pixel_values.shape == (1, 3, 64, 96)
    assert timer.milliseconds((2, 1, 3)) > 0
    model = tiny_model(encoder_stage_layers=(2, 1, 3))
    prefix = "model.pixel_level_module.decoder.encoder.layers."
    state = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
    for ours, theirs in enumerate((0, 1, 3, 6, 7, 8)):  # of three layers in each stage
        start = f"{prefix}{theirs}."
        found = {name: tensor for name, tensor in weights.items() if name.startswith(start)}
        state |= {f"{prefix}{ours}.{name.removeprefix(start)}": tensor for name, tensor in found.items()}
    model.load_state_dict(state)
    with torch.inference_mode():
        ours, theirs = timer.model(timer.pixel_values), model(timer.pixel_values)
    torch.testing.assert_close(ours.masks_queries_logits, theirs.masks_queries_logits)


def test_it_runs_as_prepared():
    timer = ForwardTimer(tiny_config(), 64, 96, 2, lambda model: model.to(torch.bfloat16))
    assert timer.pixel_values.dtype == torch.bfloat16
    times = timer.measure([(1, 1, 1), (2, 2, 2)], rounds=2, report=lambda line: None)
    assert list(times) == [(1, 1, 1), (2, 2, 2)] and all(len(found) == 2 and min(found) > 0 for found in times.values())


def test_more_stages():
    """Four scales, as for detection."""
    config = tiny_config(encoder_stage_layers=(1, 1, 1, 1), pixel_embedding="none")
    costs = count_costs(config, 64, 96, 2)
    assert len(costs) == 16 and max(costs.values())[0] == costs[2, 2, 2, 2][0]
