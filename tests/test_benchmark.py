"""Benchmarks: specifications, tables, and a real comparison of tiny size."""

import json
import subprocess
import sys

import pytest
import torch

from proscale_hf.benchmarking.comparison import Measurement, compare
from proscale_hf.benchmarking.tables import to_json, to_markdown
from proscale_hf.benchmarking.worker import Step, confident_class_logits, random_objects
from proscale_hf.benchmarking.workload import Candidate, Workload
from proscale_hf.cli import main


def test_candidates():
    assert Candidate.parse("proscale") == Candidate("proscale", "float32", "pytorch")
    assert str(Candidate.parse("mask2former:bfloat16")) == "mask2former:bfloat16:pytorch"
    assert Candidate.parse("proscale:float32:kernel").backend == "kernel"


@pytest.mark.parametrize(
    "text", ["yolo", "proscale:int4", "proscale:float32:magic", "mask2former:float32:kernel", "a:b:c:d"]
)
def test_impossible_candidates(text, capsys):
    assert main(["benchmark", text]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and text in error


@pytest.mark.parametrize(
    "options", [["--size", "12"], ["--size", "8x8"], ["--batch", "0"], ["--kept", "101"], ["--threads", "x"]]
)
def test_impossible_options(options, capsys):
    assert main(["benchmark", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def measurement(name, times, memory):
    measured = Measurement(Candidate.parse(name), peak_memory=memory)
    for seconds in times:
        measured.add(Step(seconds, {"forward": seconds / 2}))
    return measured


def test_tables():
    measurements = [measurement("proscale", [1.0, 2.0, 9.0], 2**20), measurement("mask2former", [6.0, 6.0, 6.0], 2**21)]
    table = to_markdown(measurements, Workload(threads=2), "proscale benchmark").splitlines()
    assert table[0] == "`proscale benchmark`" and "threads 2" in table[2]
    assert table[-2] == "| `proscale:float32:pytorch` | 2.000 s | 100% | 3.00 x | 1 MB | 0.50 | 1.000 |"
    assert table[-1] == "| `mask2former:float32:pytorch` | 6.000 s | 0% | 1.00 x | 2 MB | 1.00 | 3.000 |"
    content = json.loads(json.dumps(to_json(measurements, Workload(), "x")))
    assert content["results"][0]["times"] == [1.0, 2.0, 9.0] and content["results"][1]["median"] == 6.0
    assert content["workload"]["height"] == 800 and content["machine"]["torch"] == torch.__version__


def test_inputs_are_what_they_are_said_to_be():
    workload = Workload(labels=5, queries=7, kept=3, batch=2, height=40, width=60, objects=4)
    best = confident_class_logits(workload).argmax(-1)
    assert best.tolist() == [[0, 1, 2, 5, 5, 5, 5]] * 2
    masks, classes = random_objects(workload, torch.Generator().manual_seed(0))
    assert [mask.shape for mask in masks] == [(4, 40, 60)] * 2
    assert all(mask.flatten(1).any(1).all() for mask in masks)
    assert all(labels.min() >= 0 and labels.max() < 5 for labels in classes)


def test_peak_memory_sees_an_allocation():
    # in a process of its own: here, other tests' garbage may be freed meanwhile
    code = """
import torch
from proscale_hf.benchmarking.worker import peak_memory

with peak_memory("cpu", wanted=True) as peak:
    block = torch.ones(2**24)
    for _ in range(20):
        block.add_(1)
print(peak.value)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.9 * 2**26 < int(result.stdout) < 2 * 2**26


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "inference", "training"])
def test_a_comparison(mode):
    pytest.importorskip("torchvision")
    workload = Workload(mode=mode, height=64, width=96, backbone="resnet-50", labels=4, queries=5, kept=2, threads=1)
    candidates = [Candidate.parse("proscale"), Candidate.parse("mask2former")]
    measurements = compare(candidates, workload, repeats=2)
    for measured, candidate in zip(measurements, candidates, strict=True):
        assert measured.candidate == candidate and len(measured.times) == 2 and min(measured.times) > 0
        assert {"forward", "forward/backbone", "forward/pixel decoder", "forward/mask decoder"} <= set(measured.stages)
        for name, extra in {"inference": "postprocess", "training": "backward"}.items():
            assert (extra in measured.stages) == (mode == name)


@pytest.mark.slow
def test_a_model_that_cannot_run_is_named(capsys):
    assert main(["benchmark", "proscale", "--device", "nonsense", "--size", "64x64", "--repeats", "1"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: proscale:float32:pytorch cannot run here: ")
