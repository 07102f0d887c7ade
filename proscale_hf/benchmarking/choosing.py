"""Finds the numbers of layers (p1, p2, p3) that fit a budget of GFLOPs or of time on this machine.

All layers of a stage cost the same, so the cost of one more layer in each stage gives the costs of all configurations.
A few configurations are timed, in turns: if the machine is slow for a while, it is slow for all of them. The times of
the others are estimated: a base and a time per layer for each stage, none negative, are fitted to the measured times.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls

from proscale_hf.benchmarking.comparison import relative_spread
from proscale_hf.benchmarking.worker import Clock
from proscale_hf.cost import measure_cost
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig
from proscale_hf.models.mask2former.modeling_proscale_mask2former import ProScaleMask2FormerForUniversalSegmentation


MOST_LAYERS = 12  # in a stage

Stages = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """A configuration that fits.

    Attributes:
        encoder_stage_layers: (p1, p2, p3), the layers of each stage.
        total_gflops: of one image, see [`Cost`].
        encoder_gflops: the pixel decoder's part of `total_gflops`.
        parameters_millions: of the whole model.
        milliseconds: of a forward pass with one image.
        spread: half the distance between the quartiles of the measured times, relative to their median, which is
            `milliseconds`; None where `milliseconds` is an estimate.
        is_full: one more layer in any stage breaks the budget (or the limit of layers).
    """

    encoder_stage_layers: Stages
    total_gflops: float
    encoder_gflops: float
    parameters_millions: float
    milliseconds: float
    spread: float | None
    is_full: bool


def choose(
    config: ProScaleMask2FormerConfig,
    height: int,
    width: int,
    gflops: float = float("inf"),
    milliseconds: float = float("inf"),
    max_layers: int = 4,
    timed: int = 5,
    rounds: int = 5,
    prepare: Callable[[ProScaleMask2FormerForUniversalSegmentation], object] = lambda model: None,
    report: Callable[[str], None] = lambda line: None,
) -> list[Choice]:
    """
    Find the configurations that fit both budgets.

    Args:
        config: the model, whose `encoder_stage_layers` are left open.
        height: of the image in pixels.
        width: as `height`.
        gflops: the most that one image may cost, in the papers' convention, see [`Cost`].
        milliseconds: the most that a forward pass with one image may take.
        max_layers: the most layers that a stage may have.
        timed: how many of the configurations that fit are timed, the fullest and costliest first.
        rounds: timed forward passes of each configuration; the median counts.
        prepare: called with the model before it is timed, to move it to its device and type, such as
            `lambda model: model.to("cuda", torch.bfloat16)`.
        report: called with a line that says how long the measurements will take.

    Returns:
        The full ones, then the others; in both groups the costliest comes first.

    Raises:
        ValueError: nothing fits, and the message says what the smallest costs; or the encoder is not PRO-SCALE's; or
            an argument is not possible.
    """
    if config.encoder != "proscale":
        raise ValueError(f"only the encoder 'proscale' has stages to choose, this is {config.encoder!r}")
    if min(timed, rounds) < 1 or not 1 <= max_layers <= MOST_LAYERS:
        raise ValueError(f"`timed` and `rounds` must be at least 1, `max_layers` 1 to {MOST_LAYERS}")
    costs = count_costs(config, height, width, max_layers)
    smallest = min(costs)
    if costs[smallest][0] > gflops:
        raise ValueError(
            f"nothing fits {gflops:g} GFLOPs at {height} x {width}: the smallest, {smallest}, takes "
            f"{costs[smallest][0]:.1f}; give a smaller image or another backbone"
        )
    affordable = {stages for stages, (total, *_) in costs.items() if total <= gflops}

    timer = ForwardTimer(config, height, width, max_layers, prepare)
    measured: dict[Stages, list[float]] = {}

    def measure(candidates: Iterable[Stages]) -> dict[Stages, float]:
        """Measure more configurations; returns the times of all affordable ones, estimated where not measured."""
        new = [stages for stages in candidates if stages not in measured]
        measured.update(timer.measure(new, rounds, report))
        medians = {stages: statistics.median(found) for stages, found in measured.items()}
        return {**fit_times(medians, affordable), **medians}

    def order(fitting: Set[Stages]) -> list[Stages]:
        return sorted(fitting, key=lambda stages: (not _is_full(stages, fitting), -costs[stages][0]))

    corners = [smallest, *(_with(smallest, stage, max_layers) for stage in range(len(smallest)))]
    if milliseconds < float("inf"):
        times = measure(corners)
        times = measure(order({stages for stages in affordable if times[stages] <= milliseconds})[:timed])
    else:
        times = measure([*order(affordable)[:timed], *(corners if len(affordable) > timed else ())])
    fitting = {stages for stages in affordable if times[stages] <= milliseconds}
    if not fitting:
        raise ValueError(
            f"nothing fits {milliseconds:g} ms at {height} x {width}: the smallest, {smallest}, takes "
            f"{times[smallest]:.0f} ms; give a smaller image, another backbone, bfloat16 or a compiled kernel"
        )
    return [
        Choice(
            stages,
            *costs[stages],
            milliseconds=times[stages],
            spread=relative_spread(measured[stages]) if stages in measured else None,
            is_full=_is_full(stages, fitting),
        )
        for stages in order(fitting)
    ]


def count_costs(
    config: ProScaleMask2FormerConfig, height: int, width: int, max_layers: int
) -> dict[Stages, tuple[float, float, float]]:
    """
    Count what every configuration costs.

    Args:
        config: the model, whose `encoder_stage_layers` are left open.
        height: of the image in pixels.
        width: as `height`.
        max_layers: the most layers that a stage may have.

    Returns:
        For every configuration: GFLOPs in total and of the encoder, and parameters in millions.
    """

    def count(stages: Stages) -> np.ndarray:
        cost = measure_cost(_with_stages(config, stages), height, width)
        return np.array([cost.total_gflops, cost.encoder_gflops, cost.parameters_millions])

    smallest = (1,) * len(config.encoder_strides)
    base = count(smallest)
    layers = np.stack([count(_with(smallest, stage, 2)) - base for stage in range(len(smallest))])
    return {
        stages: tuple((base + np.subtract(stages, smallest) @ layers).tolist())
        for stages in itertools.product(range(1, max_layers + 1), repeat=len(smallest))
    }


def fit_times(times: dict[Stages, float], stages: Iterable[Stages]) -> dict[Stages, float]:
    """
    Estimate times from measured ones.

    Args:
        times: measured times.
        stages: configurations to estimate.

    Returns:
        For each of `stages` its time: a base and a time per layer in each stage, none negative, fitted to `times`.
    """
    coefficients, _ = nnls(np.array([(1, *measured) for measured in times], dtype=float), np.array([*times.values()]))
    return {one: float(np.dot((1, *one), coefficients)) for one in stages}


class ForwardTimer:
    """Times forward passes with one image; one model with random weights serves all numbers of layers.

    Args:
        config: the model.
        height: of the image in pixels.
        width: as `height`.
        max_layers: the most layers that a stage may have.
        prepare: called with the model, to move it to its device and type.
    """

    def __init__(
        self,
        config: ProScaleMask2FormerConfig,
        height: int,
        width: int,
        max_layers: int,
        prepare: Callable[[ProScaleMask2FormerForUniversalSegmentation], object],
    ):
        self.largest = (max_layers,) * len(config.encoder_strides)
        self.model = ProScaleMask2FormerForUniversalSegmentation(_with_stages(config, self.largest)).eval()
        prepare(self.model)
        stride, channels = config.feature_strides[-1], config.backbone_config.num_channels
        size = (-(-side // stride) * stride for side in (height, width))
        self.pixel_values = torch.randn((1, channels, *size)).to(self.model.device, self.model.dtype)
        self.clock = Clock(str(self.model.device))

    def measure(
        self, candidates: Sequence[Stages], rounds: int, report: Callable[[str], None]
    ) -> dict[Stages, list[float]]:
        """
        Time some configurations.

        Args:
            candidates: the configurations, which take turns.
            rounds: passes of each that count.
            report: called with a line that says how long this takes at most.

        Returns:
            The times of each in milliseconds.
        """
        if not candidates:
            return {}
        warm = [self.milliseconds(self.largest) for _ in range(2)][-1]
        seconds = warm / 1000 * len(candidates) * rounds
        report(f"timing {len(candidates)} configurations, {rounds} rounds: at most about {seconds:.0f} s")
        times: dict[Stages, list[float]] = {stages: [] for stages in candidates}
        for _ in range(rounds):
            for stages, found in times.items():
                found.append(self.milliseconds(stages))
        return times

    def milliseconds(self, stages: Stages) -> float:
        """One forward pass with the first layers of each stage."""
        starts = itertools.accumulate((0, *self.largest[:-1]))
        encoder = self.model.model.pixel_level_module.decoder.encoder
        encoder.stages = [(start, start + layers) for start, layers in zip(starts, stages, strict=True)]
        with torch.inference_mode():
            self.clock.synchronize()
            start = time.perf_counter()
            self.model(self.pixel_values)
            self.clock.synchronize()
            return 1000 * (time.perf_counter() - start)


def _is_full(stages: Stages, fitting: Set[Stages]) -> bool:
    return not any(_with(stages, stage, layers + 1) in fitting for stage, layers in enumerate(stages))


def _with(stages: Stages, stage: int, layers: int) -> Stages:
    return (*stages[:stage], layers, *stages[stage + 1 :])


def _with_stages(config: ProScaleMask2FormerConfig, stages: Stages) -> ProScaleMask2FormerConfig:
    return type(config).from_dict({**config.to_dict(), "encoder_stage_layers": stages})
