"""Benchmarks: specifications, tables, and a real comparison of tiny size."""

import json
import subprocess
import sys

import pytest
import torch

from proscale_hf.benchmarking.comparison import Comparison, Measurement, compare
from proscale_hf.benchmarking.tables import to_json, to_markdown
from proscale_hf.benchmarking.worker import Step, confident_class_logits, padded_size, pixel_mask, random_objects
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
    assert error.startswith("error: ") and error.count("\n") == 1 and error.count(text) == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--size", "12"],
        ["--size", "8x8"],
        ["--batch", "0"],
        ["--kept", "101"],
        ["--threads", "x"],
        ["--mixed", "--mode", "training"],
        ["--size", "64x64,"],
    ],
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
    comparison = Comparison(Workload(threads=2), measurements)
    table = to_markdown([comparison], "proscale benchmark").splitlines()
    assert table[0] == "`proscale benchmark`" and "threads 2" in table[2]
    assert table[-2] == "| `proscale:float32:pytorch` | 2.000 s | 100% | 3.00 x | 1 MB | 0.50 | 1.000 |"
    assert table[-1] == "| `mask2former:float32:pytorch` | 6.000 s | 0% | 1.00 x | 2 MB | 1.00 | 3.000 |"
    content = json.loads(json.dumps(to_json([comparison], "x")))
    results = content["comparisons"][0]["results"]
    assert results[0]["times"] == [1.0, 2.0, 9.0] and results[1]["median"] == 6.0
    assert content["comparisons"][0]["workload"]["height"] == 800 and content["machine"]["torch"] == torch.__version__


def test_a_table_names_what_differs():
    comparisons = [
        Comparison(
            Workload(height=64, width=96, batch=batch, queries=7),
            [measurement("proscale", [float(batch)], 2**20), measurement("mask2former", [3.0 * batch], 2**20)],
        )
        for batch in (1, 4)
    ]
    header, _, *rows = to_markdown(comparisons, "x").splitlines()[4:]
    assert header.startswith("| batch | model | median |")
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 1", "| 4", "| 4"]
    assert "| 4.000 s | 0% | 3.00 x |" in rows[2]


def test_lists_are_measured_in_every_combination(monkeypatch, capsys, tmp_path):
    def compare_in_no_time(candidates, workload, repeats):
        if workload.queries == 300:
            raise RuntimeError("not enough memory")
        return Comparison(workload, [measurement(str(candidates[0]), [1.0] * repeats, 1)])

    monkeypatch.setattr("proscale_hf.benchmarking.comparison.compare", compare_in_no_time)
    command = ["benchmark", "proscale", "--size", "64x96,96x64", "--batch", "1,2,3", "--json", str(tmp_path / "a.json")]
    assert main(command) == 0
    assert "| size | batch | model |" in capsys.readouterr().out
    workloads = [c["workload"] for c in json.loads((tmp_path / "a.json").read_text())["comparisons"]]
    assert [(w["height"], w["batch"]) for w in workloads] == [(h, b) for h in (64, 96) for b in (1, 2, 3)]
    assert main(["benchmark", "proscale", "--queries", "50,300"]) == 1  # the first is shown all the same
    printed = capsys.readouterr()
    assert "| 1.000 s |" in printed.out and printed.err == "error: not enough memory\n"


def test_inputs_are_what_they_are_said_to_be():
    workload = Workload(labels=5, queries=7, kept=3, batch=2, height=40, width=60, objects=4)
    best = confident_class_logits(workload).argmax(-1)
    assert best.tolist() == [[0, 1, 2, 5, 5, 5, 5]] * 2
    masks, classes = random_objects(workload, torch.Generator().manual_seed(0))
    assert [mask.shape for mask in masks] == [(4, 40, 60)] * 2
    assert all(mask.flatten(1).any(1).all() for mask in masks)
    assert all(labels.min() >= 0 and labels.max() < 5 for labels in classes)


def test_images_of_mixed_sizes():
    workload = Workload(height=40, width=60, batch=3, mixed=True)
    assert workload.image_sizes == [(40, 60), (60, 40), (40, 60)] and padded_size(workload) == (60, 60)
    mask = pixel_mask(workload)
    assert mask.shape == (3, 60, 60) and mask.sum((1, 2)).tolist() == [2400] * 3
    assert mask[1, :, :40].all() and mask[0, :40].all()


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
    measurements = compare(candidates, workload, repeats=2).measurements
    for measured, candidate in zip(measurements, candidates, strict=True):
        assert measured.candidate == candidate and len(measured.times) == 2 and min(measured.times) > 0
        assert {"forward", "forward/backbone", "forward/pixel decoder", "forward/mask decoder"} <= set(measured.stages)
        for name, extra in {"inference": "postprocess", "training": "backward"}.items():
            assert (extra in measured.stages) == (mode == name)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "inference"])
def test_a_comparison_of_mixed_sizes(mode):
    pytest.importorskip("torchvision")
    workload = Workload(
        mode=mode,
        height=64,
        width=96,
        batch=2,
        mixed=True,
        backbone="resnet-50",
        labels=4,
        queries=5,
        kept=2,
        threads=1,
    )
    candidates = [Candidate.parse("proscale"), Candidate.parse("mask2former")]
    assert all(m.median > 0 for m in compare(candidates, workload, repeats=1).measurements)


@pytest.mark.slow
def test_a_model_that_cannot_run_is_named(capsys):
    assert main(["benchmark", "proscale", "--device", "nonsense", "--size", "64x64", "--repeats", "1"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: proscale:float32:pytorch cannot run here: ")
