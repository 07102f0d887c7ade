"""The results of a benchmark as Markdown, and as plain values for JSON."""

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from proscale_hf.benchmarking.comparison import Comparison
from proscale_hf.benchmarking.workload import Workload


def to_markdown(comparisons: Sequence[Comparison], command: str) -> str:
    """
    Write a benchmark's results as Markdown.

    Args:
        comparisons: results of `compare`; the last model of each is the one that the others are compared with.
        command: the command line, for others to repeat.

    Returns:
        Machine, versions, command, and one row for each model and workload. Settings that differ between the workloads
        have columns of their own.
    """
    stages = list(dict.fromkeys(stage for c in comparisons for m in c.measurements for stage in m.stages))
    settings = [settings_of(comparison.workload) for comparison in comparisons]
    varying = [name for name in settings[0] if len({setting[name] for setting in settings}) > 1]
    rows = [[*varying, "model", "median", "spread", "speed", "peak memory", "of the last", *stages]]
    rows.append(["---"] * len(rows[0]))
    for comparison, setting in zip(comparisons, settings, strict=True):
        reference = comparison.measurements[-1]
        for m in comparison.measurements:
            parts = [f"{statistics.median(m.stages[name]):.3f}" if name in m.stages else "" for name in stages]
            memory_ratio = f"{m.peak_memory / reference.peak_memory:.2f}" if reference.peak_memory else ""
            rows.append(
                [
                    *(setting[name] for name in varying),
                    f"`{m.candidate}`",
                    f"{m.median:.3f} s",
                    f"{m.spread:.0%}",
                    f"{reference.median / m.median:.2f} x",
                    f"{m.peak_memory / 2**20:.0f} MB",
                    memory_ratio,
                    *parts,
                ]
            )
    workload = comparisons[0].workload
    machine = ", ".join(f"{name} {value}" for name, value in versions(workload.device, workload.threads).items())
    return "\n".join((f"`{command}`", "", machine, "", *(f"| {' | '.join(row)} |" for row in rows)))


def settings_of(workload: Workload) -> dict[str, str]:
    """The settings that may have several values in a command line, as they are written there."""
    numbers = {name: str(getattr(workload, name)) for name in ("batch", "queries", "objects")}
    return {"size": f"{workload.height}x{workload.width}", **numbers}


def to_json(comparisons: Sequence[Comparison], command: str) -> dict[str, Any]:
    """The same as plain values; times in seconds, memory in bytes."""
    workload = comparisons[0].workload
    return {
        "command": command,
        "machine": versions(workload.device, workload.threads),
        "comparisons": [
            {
                "workload": asdict(comparison.workload),
                "results": [
                    {**asdict(m), "median": m.median, "spread": m.spread, "candidate": str(m.candidate)}
                    for m in comparison.measurements
                ],
            }
            for comparison in comparisons
        ],
    }


def versions(device: str, threads: int = 0) -> dict[str, str]:
    """What the numbers depend on: processor or accelerator, threads, versions.

    Args:
        device: where the model runs.
        threads: of the CPU; 0 means the number that PyTorch uses now.
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
    """The processor's name, with its widest vector instructions."""
    import torch

    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
