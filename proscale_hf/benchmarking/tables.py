"""The results of a benchmark as Markdown, and as plain values for JSON."""

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .comparison import Measurement
from .workload import Workload


def to_markdown(measurements: Sequence[Measurement], workload: Workload, command: str) -> str:
    """
    Args:
        measurements: of `compare`; the last one is what the others are compared with.
        workload: what the models were given.
        command: the command line, to be repeated by others.

    Returns:
        Machine, versions, command, and one row for each model.
    """
    stages = list(dict.fromkeys(stage for m in measurements for stage in m.stages))
    reference = measurements[-1]
    header = ["model", "median", "spread", "speed", "peak memory", "of the last", *stages]
    rows = []
    for m in measurements:
        parts = [f"{statistics.median(m.stages[name]):.3f}" if name in m.stages else "" for name in stages]
        memory_ratio = f"{m.peak_memory / reference.peak_memory:.2f}" if reference.peak_memory else ""
        rows.append(
            [
                f"`{m.candidate}`",
                f"{m.median:.3f} s",
                f"{m.spread:.0%}",
                f"{reference.median / m.median:.2f} x",
                f"{m.peak_memory / 2**20:.0f} MB",
                memory_ratio,
                *parts,
            ]
        )
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    machine = ", ".join(f"{name} {value}" for name, value in versions(workload.device, workload.threads).items())
    return "\n".join((f"`{command}`", "", machine, "", *lines))


def to_json(measurements: Sequence[Measurement], workload: Workload, command: str) -> dict[str, Any]:
    """The same as plain values; times in seconds, memory in bytes."""
    return {
        "command": command,
        "machine": versions(workload.device, workload.threads),
        "workload": asdict(workload),
        "results": [
            {**asdict(m), "median": m.median, "spread": m.spread, "candidate": str(m.candidate)} for m in measurements
        ],
    }


def versions(device: str, threads: int = 0) -> dict[str, str]:
    """What the numbers depend on: processor or accelerator, threads, versions.

    Args:
        device: where the model runs.
        threads: of the CPU; 0: those that PyTorch uses now.
    """
    import torch
    import transformers

    if torch.device(device).type == "cuda":
        machine = {"device": torch.cuda.get_device_name(device)}
    else:
        machine = {
            "processor": processor_name(),
            "cores": str(os.cpu_count()),
            "threads": str(threads or torch.get_num_threads()),
        }
    return {
        **machine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor_name() -> str:
    """The processor's own name for itself, with its widest vector instructions."""
    import torch

    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
