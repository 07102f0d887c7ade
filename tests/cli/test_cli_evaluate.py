"""`proscale evaluate` and examples/evaluate.py: what they print and write, and the one line they say if they cannot."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evaluation_data import CATEGORIES, ID2LABEL, STUFF, instance_json, options_of, write_set
from helpers import tiny_model
from paths import FIXTURES, ROOT
from proscale_hf import ProScaleMask2FormerImageProcessorPil
from proscale_hf.cli import console, main


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory) -> Path:
    """Random, but it finds something; its labels are those of the data."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_model(id2label=ID2LABEL, num_queries=20)
    with torch.no_grad():
        model.class_predictor.weight.mul_(30)
        model.class_predictor.bias[-1] -= 5
    model.save_pretrained(folder)
    size = {"shortest_edge": 32, "longest_edge": 96}
    ProScaleMask2FormerImageProcessorPil(size=size, label_ids_to_fuse=STUFF).save_pretrained(folder)
    return folder


@pytest.fixture
def command(tmp_path, monkeypatch, saved_model) -> list[str]:
    """A command line that works, in a folder with nothing but the data set."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(console, "PATIENCE", 600.0)  # a slow machine must not add lines to stderr
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    settings = [f"--set={option}={path}" for option, path in options_of(write_set(Path("set"), images=5)).items()]
    base = ["evaluate", "--model", str(saved_model), "--dataset", "coco_panoptic", *settings, "--device", "cpu"]
    return [*base, "--workers", "0"]


def fails(capsys, arguments: list[str], exit_code: int = 1) -> str:
    """Runs a command that must fail with one line and leave nothing behind; returns that line."""
    before = sorted(os.listdir())
    assert main(arguments) == exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert sorted(os.listdir()) == before
    return captured.err


class TestResults:
    def test_a_table_is_printed(self, command, capsys):
        assert main(command) == 0
        captured = capsys.readouterr()
        assert "| model | PQ | SQ | RQ | PQ things | PQ stuff | AP | AP50 | mIoU | images | images/s |" in captured.out
        assert "| grass | stuff |" in captured.out
        assert captured.err == ""
        assert os.listdir() == ["set"]

    def test_files(self, command, capsys):
        assert main([*command, "--output", "new/out", "--save-predictions", "--samples", "3", "--batch-size", "2"]) == 0
        report = json.loads(Path("new/out/results.json").read_text())
        assert report["images"] == 3 and report["categories"] == CATEGORIES and report["skipped"] == []
        assert report["command"].startswith("proscale evaluate")
        assert {"torch", "transformers", "python", "proscale_hf"} <= set(report["versions"])
        assert Path("new/out/results.md").read_text() == capsys.readouterr().out
        assert sorted(os.listdir("new/out")) == [
            "instances.json",
            "panoptic",
            "panoptic.json",
            "results.json",
            "results.md",
            "semantic",
        ]
        assert len(os.listdir("new/out/panoptic")) == 3

    def test_without_predictions(self, command):
        assert main([*command, "--output", "out", "--tasks", "semantic"]) == 0
        assert sorted(os.listdir("out")) == ["results.json", "results.md"]
        assert "panoptic" not in json.loads(Path("out/results.json").read_text())

    def test_instance_annotations(self, command):
        instance_json(Path("instances.json"), Path("set"))
        options = ["--tasks", "instance", "--instance-annotations", "instances.json"]
        assert main([*command, *options, "--output", "json"]) == 0
        assert main([*command, "--tasks", "instance", "--output", "things"]) == 0
        results = [json.loads(Path(name, "results.json").read_text())["instance"] for name in ("json", "things")]
        assert results[0] == results[1]

    def test_precision(self, command):
        assert main([*command, "--dtype", "bfloat16", "--tasks", "panoptic"]) == 0

    def test_a_damaged_image_can_be_left_out(self, command, capsys):
        Path("set/images/photo1.png").write_bytes(b"no picture")
        assert "photo1.png" in fails(capsys, [*command, "--output", "out", "--save-predictions"])
        assert main([*command, "--on-error", "skip", "--output", "out", "--save-predictions"]) == 0
        captured = capsys.readouterr()
        assert "1 images were left out" in captured.out and "photo1.png" in captured.out
        assert len(json.loads(Path("out/panoptic.json").read_text())["annotations"]) == 4


class TestDemoModel:
    def test_same_quality_as_without_files(self, command):
        """The numbers of examples/evaluate_demo.py, which reads no file."""
        sys.path.insert(0, str(ROOT / "examples"))
        try:
            import evaluate_demo

            import demo_scenes
        finally:
            sys.path.pop(0)
        from proscale_hf.cli.loading import load_model

        scenes = demo_scenes.DemoScenes(6, "held-out")
        expected = evaluate_demo.measure_panoptic_quality(*load_model(None), scenes)
        demo_scenes.write_scenes(scenes, Path("scenes"))
        settings = ["images=scenes/images", "annotations=scenes/panoptic.json", "segment_maps=scenes/panoptic"]
        options = [f"--set={setting}" for setting in settings]
        options += ["--output", "out", "--batch-size", str(evaluate_demo.BATCH_SIZE), "--tasks", "panoptic"]
        assert main(["evaluate", "--dataset", "coco_panoptic", *options]) == 0
        assert json.loads(Path("out/results.json").read_text())["panoptic"] == expected
        assert 0.5 < expected["All"]["pq"] < 1


class TestWrongCommandLine:
    @pytest.mark.parametrize(
        ("options", "hint"),
        [
            (["--tasks", "depth"], "panoptic, instance, semantic"),
            (["--tasks", ""], "panoptic, instance, semantic"),
            (["--save-predictions"], "--output"),
            (["--batch-size", "0"], "too few"),
            (["--samples", "-1"], "possible number"),
            (["--workers", "x"], "possible number"),
            (["--dtype", "int8"], "float32"),
            (["--output", "set"], "is there already"),
            (["--output", "set/panoptic.json"], "is there already"),
            (["--output", "set/panoptic.json/new/out"], "may be written to"),
            (["--device", "abacus"], "abacus"),
        ],
    )
    def test_one_line(self, command, capsys, options, hint):
        assert hint in fails(capsys, [*command, *options], exit_code=2)


class TestWhatCannotBe:
    def test_other_labels(self, command, capsys):
        command[2] = str(ROOT / "proscale_hf" / "demo_model")
        line = fails(capsys, [*command, "--output", "out"])
        assert "13 labels are not the data set's 4 categories" in line and "cat" in line and "digit 0" in line

    def test_impossible_task(self, command, capsys):
        instance_json(Path("instances.json"), Path("set"))
        options = ["--dataset", "coco_instance", "--set=images=set/images", "--set=annotations=instances.json"]
        line = fails(capsys, [*command[:3], *options, "--tasks", "panoptic"])
        assert "cannot measure panoptic, only instance" in line

    def test_instance_annotations_of_other_images(self, command, capsys):
        instance_json(Path("instances.json"), Path("set"), images=2)
        line = fails(capsys, [*command, "--instance-annotations", "instances.json", "--output", "out"])
        assert "does not list image" in line

    def test_a_missing_library(self, command, capsys, monkeypatch):
        monkeypatch.delitem(sys.modules, "proscale_hf.evaluation.coco_files")
        monkeypatch.setitem(sys.modules, "pycocotools", None)
        assert 'pip install "proscale-hf[evaluate]"' in fails(capsys, command)


class TestStoredPredictions:
    """The panoptic quality of files, without a model; the fixture's numbers are the reference's."""

    TRUTH, PREDICTION = (str(FIXTURES / "panoptic_quality" / f"panoptic_{kind}.json") for kind in ("gt", "pred"))
    command = ("evaluate", "--predictions", PREDICTION, "--truth", TRUTH)

    @pytest.fixture(autouse=True)
    def here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(console, "PATIENCE", 600.0)

    def test_the_numbers_of_the_reference(self, capsys):
        assert main([*self.command, "--output", "out", "--workers", "0"]) == 0
        report = json.loads(Path("out/results.json").read_text())
        expected = json.loads((FIXTURES / "panoptic_quality" / "expected.json").read_text())
        for group in ("All", "Things", "Stuff"):
            assert report["panoptic"][group] == pytest.approx(expected[group], abs=1e-12)
        assert (report["model"], report["images"], report["skipped"]) == (self.PREDICTION, 12, [])
        assert {"python", "numpy", "proscale_hf"} == set(report["versions"])
        printed = capsys.readouterr()
        assert printed.out == Path("out/results.md").read_text() and printed.err == ""
        assert "| model | PQ | SQ | RQ | PQ things | PQ stuff | images | images/s |" in printed.out
        assert f"| {100 * expected['All']['pq']:.1f} |" in printed.out

    def test_folders_of_other_names(self, capsys):
        folders = [Path(json_file).with_suffix("") for json_file in (self.PREDICTION, self.TRUTH)]
        for name, folder in zip(("found", "true"), folders, strict=True):
            Path(name).symlink_to(folder)
        truth, prediction = [self.TRUTH, "true"], [self.PREDICTION, "found"]
        assert main(["evaluate", "--predictions", *prediction, "--truth", *truth, "--workers", "1"]) == 0
        assert "| 47.5 |" in capsys.readouterr().out

    def test_what_a_model_left_is_measured_as_the_model_was(self, command):
        """`command` works in a folder of its own."""
        assert main([*command, "--output", "out", "--save-predictions", "--tasks", "panoptic"]) == 0
        stored = ["--predictions", "out/panoptic.json", "--truth", "set/panoptic.json", "set/maps"]
        assert main(["evaluate", *stored, "--output", "again", "--workers", "0"]) == 0
        results = [json.loads(Path(name, "results.json").read_text())["panoptic"] for name in ("out", "again")]
        assert results[0] == results[1]

    @pytest.mark.parametrize(
        ("arguments", "hint"),
        [
            (["--predictions", "a.json"], "--truth"),
            (["--truth", "a.json"], "--predictions"),
            (["--predictions", "a", "b", "c", "--truth", "a"], "--predictions takes a JSON file and a folder"),
            (["--predictions", "a", "--truth", "b", "--model", "m"], "--model is for models"),
            (["--predictions", "a", "--truth", "b", "--set", "root=x"], "--set is for models"),
            (["--predictions", "a", "--truth", "b", "--output", "file"], "is there already"),
            ([], "--dataset"),
        ],
    )
    def test_wrong_command_lines(self, capsys, arguments, hint):
        Path("file").touch()
        assert hint in fails(capsys, ["evaluate", *arguments], exit_code=2)

    def test_bad_files_are_one_line(self, capsys):
        Path("bad.json").write_text("{")
        line = fails(capsys, ["evaluate", "--predictions", "bad.json", "--truth", self.TRUTH, "--output", "out"])
        assert "bad.json is not a JSON file" in line

    def test_neither_torch_nor_datasets_is_imported(self):
        code = (
            "import sys\n"
            "from proscale_hf.cli import main\n"
            f"assert main({[*self.command, '--workers', '1']}) == 0\n"
            "assert not {'torch', 'datasets', 'pycocotools'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def launch(arguments: list[str], processes: int) -> None:
    """Runs examples/evaluate.py in several processes, as accelerate or torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    script = [sys.executable, str(ROOT / "examples" / "evaluate.py"), *arguments]
    running = [
        subprocess.Popen(script, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(processes)
    ]
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes
    assert [b"| model |" in text for text in printed] == [True] + [False] * (processes - 1)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", ["2", "5"])
def test_two_processes_find_what_one_finds(command, batch_size):
    Path("set/images/photo3.png").write_bytes(b"no picture")  # among those of the second process, if that has any
    options = ["--batch-size", batch_size, "--save-predictions", "--on-error", "skip"]
    assert main([*command, *options, "--output", "one"]) == 0
    launch([*command[1:], *options, "--output", "two"], 2)
    one, two = (json.loads(Path(name, "results.json").read_text()) for name in ("one", "two"))
    for name in ("panoptic", "instance", "semantic", "images", "skipped"):
        assert one[name] == two[name]
    assert len(one["skipped"]) == 1 and "photo3.png" in one["skipped"][0]
    assert two["versions"]["processes"] == "2"
    for name in os.listdir("one/panoptic"):
        assert Path("one/panoptic", name).read_bytes() == Path("two/panoptic", name).read_bytes()
    assert sorted(os.listdir("one")) == sorted(os.listdir("two"))
    for name in ("annotations", "images"):
        entries = [json.loads(Path(folder, "panoptic.json").read_text())[name] for folder in ("one", "two")]
        assert sorted(map(json.dumps, entries[0])) == sorted(map(json.dumps, entries[1]))
