"""Measures models in turns: if the machine is slow for a while, it is slow for all of them.

Each model runs in a process of its own, so its peak memory has nothing of the others.
"""

import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from proscale_hf.benchmarking.worker import Step, work
from proscale_hf.benchmarking.workload import Candidate, Workload
from proscale_hf.endings import deaf_children


@dataclass
class Comparison:
    """Models and what they were given.

    Attributes:
        workload: the same for all of them.
        measurements: one for each model.
    """

    workload: Workload
    measurements: list["Measurement"]


@dataclass
class Measurement:
    """What was measured of one candidate.

    Attributes:
        candidate: the model.
        times: seconds of each step.
        stages: seconds of each step's parts, by name.
        peak_memory: bytes that a step takes at most, beyond those in use before it.
    """

    candidate: Candidate
    times: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    peak_memory: int = 0

    def add(self, step: Step) -> None:
        """Count one more step."""
        self.times.append(step.seconds)
        for name, seconds in step.stages.items():
            self.stages.setdefault(name, []).append(seconds)

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.times)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        return relative_spread(self.times)


def relative_spread(times: Sequence[float]) -> float:
    """Half the distance between the quartiles, relative to the median; 0 for a single value."""
    if len(times) < 2:
        return 0.0
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return (third - first) / 2 / statistics.median(times)


def compare(
    candidates: Sequence[Candidate],
    workload: Workload,
    repeats: int = 5,
    report: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """
    Measure candidates in turns: one step each, again and again.

    Args:
        candidates: the models.
        workload: what each model is given.
        repeats: steps of each model that count, after two that do not count.
        report: called with a line of progress now and then.

    Returns:
        The workload, and one measurement for each candidate, in their order.

    Raises:
        RuntimeError: a model cannot be built or run here; the message says which and why.
    """
    measurements = [Measurement(candidate) for candidate in candidates]
    with _workers(candidates, workload) as connections:
        for measurement, connection in zip(measurements, connections, strict=True):
            report(f"building {measurement.candidate}")
            _answer(connection, measurement.candidate)
            for _ in range(2):  # the first compiles, and takes memory that later steps use again
                step = _step(connection, measurement.candidate, with_memory=True)
                measurement.peak_memory = max(measurement.peak_memory, step.peak_memory)
        for repeat in range(repeats):
            report(f"round {repeat + 1} of {repeats}")
            for measurement, connection in zip(measurements, connections, strict=True):
                measurement.add(_step(connection, measurement.candidate, with_memory=False))
    return Comparison(workload, measurements)


def _step(connection: Connection, candidate: Candidate, with_memory: bool) -> Step:
    connection.send(with_memory)
    return _answer(connection, candidate)


def _answer(connection: Connection, candidate: Candidate) -> Step:
    try:
        answer = connection.recv()
    except EOFError:
        raise RuntimeError(f"{candidate} ended without an error message; there may be too little memory") from None
    if isinstance(answer, str):
        raise RuntimeError(f"{candidate} cannot run here: {answer}")
    return answer


@contextmanager
def _workers(candidates: Sequence[Candidate], workload: Workload) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("spawn")
    processes, connections = [], []
    try:
        for candidate in candidates:
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(candidate, workload, theirs), daemon=True)
            with deaf_children():
                process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)
        yield connections
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
