"""`examples/train_accelerate.py` alone: evaluation, signals, changes of the recipe.

What both training scripts do is in test_train_scripts.py, and what several processes do in test_train_processes.py.
"""

import errno
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file


pytest.importorskip("torchvision")  # augmentation needs it

from proscale_hf.training.checkpoint import PROGRESS, checkpoints
from training_runs import LOOP, environment, log_of, same_weights, wait_for, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture
def run(recipe):
    """Runs the script in this process; without evaluation unless it is told what evaluations shall give."""

    def run(output, *words, qualities=None):
        found = iter(qualities or ())
        results = {"sq": 0.5, "rq": 0.5, "n": 1}

        def evaluate(model, image_processor, dataset, **options):
            part = {"pq": next(found), **results}
            return {"panoptic": {"All": part, "Things": part, "Stuff": part}, "images": 3, "skipped": []}

        without = [] if qualities else ["data.validation=null"]
        LOOP.run(recipe, output, *words, *without, evaluate=evaluate)

    return run


def test_accumulated_batches_are_the_same_images(run, tmp_path):
    run(tmp_path / "joint", "optimization.max_steps=2")
    run(tmp_path / "parts", "optimization.max_steps=2", "optimization.device_batch_size=1")
    joint, parts = log_of(tmp_path / "joint"), log_of(tmp_path / "parts")
    assert joint != parts
    assert parts == pytest.approx(joint, rel=0.1)  # batch norm and the number of masks are those of a part


def test_the_loss_falls(run, tmp_path):
    run(tmp_path / "out", "optimization.max_steps=40", "checkpoint.every=40", "log_every=10")
    losses = list(log_of(tmp_path / "out").values())
    assert losses[-1] < losses[0] - 3


def test_the_result_is_a_complete_model(run, tmp_path):
    from proscale_hf import ProScaleMask2FormerForUniversalSegmentation
    from proscale_hf.hub.auto_classes import image_processor_class

    run(tmp_path / "out", "optimization.ema=0.5", "optimization.max_steps=2")
    model = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "out")
    processor = image_processor_class().from_pretrained(tmp_path / "out")
    assert model.config.id2label[12] == "gravel"
    assert list(processor.label_ids_to_fuse) == [10, 11, 12]
    assert (tmp_path / "out" / "README.md").is_file()
    assert (tmp_path / "out" / "modeling_proscale_mask2former.py").is_file()
    state = load_file(checkpoints(tmp_path / "out")[-1] / "model.safetensors")
    assert not torch.equal(state["class_predictor.weight"], model.class_predictor.weight)  # the average is saved


def test_checkpoints_are_kept_and_deleted(run, tmp_path):
    run(tmp_path / "out", "checkpoint.every=1", "checkpoint.keep=3")
    names = [folder.name for folder in checkpoints(tmp_path / "out")]
    assert names == ["step-00000004", "step-00000005", "step-00000006"]
    assert not list((tmp_path / "out").rglob(".*"))


def test_best_model_and_early_stopping(run, tmp_path):
    run(tmp_path / "out", "evaluation.every=1", "evaluation.patience=2", qualities=[0.1, 0.3, 0.2, 0.3])
    assert list(log_of(tmp_path / "out")) == [1, 2, 3, 4]
    assert log_of(tmp_path / "out", "PQ") == {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.3}
    run(tmp_path / "two", "optimization.max_steps=2", "evaluation.every=1", qualities=[0.1, 0.3])
    best = load_file(tmp_path / "out" / "best" / "model.safetensors")
    second = load_file(checkpoints(tmp_path / "out")[0] / "model.safetensors")
    last = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(best["class_predictor.weight"], second["class_predictor.weight"])
    assert not torch.equal(best["class_predictor.weight"], last["class_predictor.weight"])


def test_a_resumed_run_remembers_the_best(run, tmp_path):
    run(tmp_path / "out", "evaluation.every=1", "optimization.max_steps=2", qualities=[0.5, 0.4])
    run(
        tmp_path / "out", "--resume", "evaluation.every=1", "evaluation.patience=2", qualities=[0.3, 0.9]
    )  # the second evaluation in a row without a new best: one before, one after
    assert list(log_of(tmp_path / "out", "PQ").items()) == [(1, 0.5), (2, 0.4), (3, 0.3)]


def test_changes_since_the_checkpoint_are_named(run, tmp_path, capsys):
    run(tmp_path / "out", "optimization.max_steps=2")
    run(tmp_path / "out", "--resume", "optimization.max_steps=3", "seed=1")
    assert "optimization.max_steps, seed." in capsys.readouterr().out


def test_another_number_of_processes_goes_on_with_new_random_numbers(run, tmp_path, capsys):
    run(tmp_path / "out", "optimization.max_steps=2")
    [folder] = checkpoints(tmp_path / "out")
    progress = json.loads((folder / PROGRESS).read_text())
    (folder / PROGRESS).write_text(json.dumps({**progress, "processes": 2}))
    (folder / "random_states_0.pkl").unlink()
    run(tmp_path / "out", "--resume", "optimization.max_steps=3")
    assert "number of processes (was 2)" in capsys.readouterr().out
    assert list(log_of(tmp_path / "out")) == [1, 2, 3]


def test_an_average_of_version_0_1_is_read(run, tmp_path):
    settings = ["optimization.max_steps=3", "optimization.ema=0.9", "checkpoint.every=2"]
    run(tmp_path / "whole", *settings)
    folder = shutil.copytree(checkpoints(tmp_path / "whole")[0], tmp_path / "cut" / "checkpoints" / "step-00000002")
    torch.save(load_file(folder / "average.safetensors"), folder / "ema.pt")
    (folder / "average.safetensors").unlink()
    run(tmp_path / "cut", "--resume", *settings)
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_model_that_cannot_be_saved_leaves_the_one_before(run, tmp_path, monkeypatch):
    from proscale_hf import ProScaleMask2FormerImageProcessor

    run(tmp_path / "out", "optimization.max_steps=2")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}

    def full(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ProScaleMask2FormerImageProcessor, "save_pretrained", full)
    with pytest.raises(SystemExit, match="No space left"):
        run(tmp_path / "out", "--resume")
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    before.pop("log.jsonl"), after.pop("log.jsonl")
    assert after == before


def test_matching_costs_that_are_not_numbers_are_counted(run, tmp_path, monkeypatch):
    from proscale_hf.losses.matching import Matcher

    def spoilt(self, *arguments, cost=Matcher.cost):
        costs = cost(self, *arguments)
        costs.view(-1)[:1] = float("nan")
        return costs

    run(tmp_path / "whole", "optimization.max_steps=2")
    assert not log_of(tmp_path / "whole", "non_finite_costs")
    monkeypatch.setattr(Matcher, "cost", spoilt)
    run(tmp_path / "spoilt", "optimization.max_steps=2")
    assert log_of(tmp_path / "spoilt", "non_finite_costs") == {1: 4, 2: 8}  # one in each of the four images


def test_checkpoints_do_not_change_the_log(run, tmp_path):
    settings = ["optimization.max_steps=5", "log_every=5", "checkpoint.every=3"]
    run(tmp_path / "out", *settings)
    whole = log_of(tmp_path / "out")
    assert list(whole) == [3, 5]  # a resumed run knows nothing of the steps before
    checkpoints(tmp_path / "out")[-1].rename(tmp_path / "taken-away")
    run(tmp_path / "out", "--resume", *settings)
    assert log_of(tmp_path / "out") == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(recipe, tmp_path, number):
    arguments = ["data.validation=null", "optimization.max_steps=100000", "checkpoint.every=100000", "workers=1"]
    with subprocess.Popen(
        [sys.executable, *LOOP.words(recipe, tmp_path / "out", *arguments)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for((tmp_path / "out" / "log.jsonl").exists, process)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    [folder] = checkpoints(tmp_path / "out")
    step = int(folder.name.removeprefix("step-"))
    assert f"error: stopped by a signal after step {step}, all is saved: go on with --resume" in errors
    assert "Traceback" not in errors
