"""The plain loop: resuming, evaluation, faults. For several processes see test_train_processes.py."""

import errno
import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file


pytest.importorskip("torchvision")  # augmentation needs it

from proscale_hf.training import checkpoint
from proscale_hf.training.batches import training_batches
from proscale_hf.training.recipe import OptimizationSection, Recipe
from training_runs import SCRIPT, environment, log_of, same_weights, wait_for, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("train_accelerate", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, recipe, monkeypatch):
    """Runs the script in this process; without evaluation unless it is told what evaluations shall give."""
    from accelerate.state import AcceleratorState, GradientState

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(output, *arguments, qualities=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        found = iter(qualities or ())
        results = {"sq": 0.5, "rq": 0.5, "n": 1}

        def evaluate(model, image_processor, dataset, **options):
            part = {"pq": next(found), **results}
            return {"panoptic": {"All": part, "Things": part, "Stuff": part}, "images": 3, "skipped": []}

        monkeypatch.setattr(script, "evaluate", evaluate)
        without = [] if qualities else ["data.validation=null"]
        values = [str(SCRIPT), "--config", str(recipe), "--output_dir", str(output), *arguments, *without]
        monkeypatch.setattr(sys, "argv", values)
        script.main()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def command(recipe, output, *arguments):
    return [sys.executable, str(SCRIPT), "--config", str(recipe), "--output_dir", str(output), *arguments]


def test_script_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 200


@pytest.mark.parametrize(
    "changes",
    [
        ["optimization.ema=0.9"],
        ["optimization.device_batch_size=2", "model.config.dropout=0.1"],
        ["workers=1", "optimization.precision=bf16"],
    ],
    ids=["ema", "accumulation-and-dropout", "workers-and-bf16"],
)
@pytest.mark.parametrize("steps", [3, 4])  # in the middle of the second epoch, and at its end
def test_a_resumed_run_is_the_same_run(run, tmp_path, changes, steps):
    run(tmp_path / "whole", *changes)
    run(tmp_path / "cut", f"checkpoint.every={steps}", *changes)
    (tmp_path / "cut" / "model.safetensors").unlink()
    for folder in checkpoint.checkpoints(tmp_path / "cut")[1:]:
        folder.rename(tmp_path / "taken-away")
    run(tmp_path / "cut", "--resume", *changes)
    whole, cut = log_of(tmp_path / "whole"), log_of(tmp_path / "cut")
    assert list(whole) == [1, 2, 3, 4, 5, 6]
    assert cut == pytest.approx(whole, abs=1e-5)
    assert len(set(whole.values())) == 6
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    for name in ("learning_rate", "loss_dice"):
        assert log_of(tmp_path / "cut", name) == pytest.approx(log_of(tmp_path / "whole", name), abs=1e-5)


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
    state = load_file(checkpoint.checkpoints(tmp_path / "out")[-1] / "model.safetensors")
    assert not torch.equal(state["class_predictor.weight"], model.class_predictor.weight)  # the average is saved


def test_checkpoints_are_kept_and_deleted(run, tmp_path):
    run(tmp_path / "out", "checkpoint.every=1", "checkpoint.keep=3")
    names = [folder.name for folder in checkpoint.checkpoints(tmp_path / "out")]
    assert names == ["step-00000004", "step-00000005", "step-00000006"]
    assert not list((tmp_path / "out").rglob(".*"))


def test_best_model_and_early_stopping(run, tmp_path):
    run(tmp_path / "out", "evaluation.every=1", "evaluation.patience=2", qualities=[0.1, 0.3, 0.2, 0.3])
    assert list(log_of(tmp_path / "out")) == [1, 2, 3, 4]
    assert log_of(tmp_path / "out", "PQ") == {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.3}
    run(tmp_path / "two", "optimization.max_steps=2", "evaluation.every=1", qualities=[0.1, 0.3])
    best = load_file(tmp_path / "out" / "best" / "model.safetensors")
    second = load_file(checkpoint.checkpoints(tmp_path / "out")[0] / "model.safetensors")
    last = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(best["class_predictor.weight"], second["class_predictor.weight"])
    assert not torch.equal(best["class_predictor.weight"], last["class_predictor.weight"])


def test_a_resumed_run_remembers_the_best(run, tmp_path):
    run(tmp_path / "out", "evaluation.every=1", "optimization.max_steps=2", qualities=[0.5, 0.4])
    run(
        tmp_path / "out", "--resume", "evaluation.every=1", "evaluation.patience=2", qualities=[0.3, 0.9]
    )  # the second evaluation in a row without a new best: one before, one after
    assert list(log_of(tmp_path / "out", "PQ").items()) == [(1, 0.5), (2, 0.4), (3, 0.3)]


def test_a_learning_rate_that_was_changed_counts(run, tmp_path):
    options = ("optimization.warmup_steps=0", "optimization.max_steps=20", "optimization.decay_at=[0.5]")
    with_rate = [*options, "optimization.learning_rate=2e-4"]
    run(tmp_path / "whole", *with_rate)
    run(tmp_path / "cut", *options, "optimization.learning_rate=8e-4", "optimization.max_steps=4")
    run(tmp_path / "cut", "--resume", *with_rate)
    resumed, whole = (log_of(tmp_path / name, "learning_rate") for name in ("cut", "whole"))
    assert {step: resumed[step] for step in range(5, 21)} == {step: whole[step] for step in range(5, 21)}
    assert resumed[1] == 4 * resumed[5] == pytest.approx(40 * resumed[11])


def test_changes_since_the_checkpoint_are_named(run, tmp_path, capsys):
    run(tmp_path / "out", "optimization.max_steps=2")
    run(tmp_path / "out", "--resume", "optimization.max_steps=3", "seed=1")
    assert "optimization.max_steps, seed." in capsys.readouterr().out


def test_another_number_of_processes_goes_on_with_new_random_numbers(run, tmp_path, capsys):
    run(tmp_path / "out", "optimization.max_steps=2")
    [folder] = checkpoint.checkpoints(tmp_path / "out")
    progress = json.loads((folder / checkpoint.PROGRESS).read_text())
    (folder / checkpoint.PROGRESS).write_text(json.dumps({**progress, "processes": 2}))
    (folder / "random_states_0.pkl").unlink()
    run(tmp_path / "out", "--resume", "optimization.max_steps=3")
    assert "number of processes (was 2)" in capsys.readouterr().out
    assert list(log_of(tmp_path / "out")) == [1, 2, 3]


def test_a_full_disk_leaves_the_previous_checkpoint(run, tmp_path, monkeypatch, capsys):
    run(tmp_path / "out", "optimization.max_steps=2", "checkpoint.keep=1")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    save = torch.save

    def full(content, file, *rest, **options):
        Path(file).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "out", "--resume", "checkpoint.keep=1")
    assert "No space left on device; what was saved before is whole" in str(error.value)
    assert str(error.value).startswith("error: cannot write") and "\n" not in str(error.value)
    after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    before.pop(tmp_path / "out" / "log.jsonl"), after.pop(tmp_path / "out" / "log.jsonl")
    assert after == before
    assert not list((tmp_path / "out").rglob("*.partial"))

    monkeypatch.setattr(torch, "save", save)
    run(tmp_path / "out", "--resume", "checkpoint.keep=1")
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path / "out")] == ["step-00000006"]


def test_a_disk_that_says_at_last_that_it_is_full(run, tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match=r"cannot write .*step-00000002: .*Disk quota exceeded"):
        run(tmp_path / "out", "optimization.max_steps=2")
    assert not checkpoint.checkpoints(tmp_path / "out")


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


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "ema.pt", "scheduler.bin", "progress.json"])
@pytest.mark.parametrize("content", [b"", bytes(range(256)) * 9], ids=["empty", "garbage"])
def test_a_damaged_checkpoint_is_named(run, tmp_path, name, content):
    run(tmp_path / "out", "optimization.max_steps=2", "optimization.ema=0.9")
    [folder] = checkpoint.checkpoints(tmp_path / "out")
    (folder / name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"error: cannot resume from {folder}: .*delete it") as error:
        run(tmp_path / "out", "--resume", "optimization.ema=0.9")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["optimizer.bin", "ema.pt", "custom_checkpoint_0.pkl"])
def test_nothing_in_a_checkpoint_is_executed(run, tmp_path, name):
    run(tmp_path / "out", "optimization.max_steps=2", "optimization.ema=0.9")
    [folder] = checkpoint.checkpoints(tmp_path / "out")
    torch.save(Harm(tmp_path / "harm"), folder / name)
    with pytest.raises(SystemExit, match="error: cannot resume from"):
        run(tmp_path / "out", "--resume", "optimization.ema=0.9")
    assert not (tmp_path / "harm").exists()


def test_random_states_are_not_unpickled_either(run, tmp_path):
    run(tmp_path / "out", "optimization.max_steps=2")
    [folder] = checkpoint.checkpoints(tmp_path / "out")
    (folder / "random_states_0.pkl").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    with pytest.raises(SystemExit, match="random numbers"):
        run(tmp_path / "out", "--resume")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.train.annotations=nowhere.json"], "nowhere.json"),
        (["data.train.rot=x"], "no option rot"),
        (["data.train.name=coco"], "no data set 'coco'"),
        (["optimization.batch_size=11"], "10 images, but optimization.batch_size is 11"),
        (["optimization.device_batch_size=3"], "is no multiple of"),
        (["optimization.max_steps=null"], "how long to train"),
        (["model.config.num_queries=0"], "num_queries"),
        (["augmentation.crop=3"], "crop"),
        (["optimization.clipp=3"], r"did you mean clip\?"),
        (["--report_to", "nobody"], "there is no tracker nobody"),
        (["--push_to_hub", "no good name"], "cannot be a repository"),
        (["optimization.learning_rate=1e30", "optimization.clip=null"], "the loss is nan at step"),
    ],
)
def test_errors_are_one_line(run, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message) as error:
        run(tmp_path / "out", *arguments)
    assert str(error.value).startswith("error: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(("part", "name"), [("images", "000004.png"), ("segment_maps", "000007.png")])
def test_what_cannot_be_read_is_named_or_skipped(run, recipe, tmp_path, capsys, part, name):
    files = tmp_path / "files"
    shutil.copytree(yaml.safe_load(recipe.read_text())["data"]["train"][part], files)
    (files / name).write_bytes(b"nothing")
    changes = [f"data.train.{part}={files}", "optimization.max_steps=4"]
    for workers in (0, 1):
        with pytest.raises(SystemExit, match=name) as error:
            run(tmp_path / f"out-{workers}", *changes, f"workers={workers}")
        assert str(error.value).startswith("error: ") and "\n" not in str(error.value)
        assert "Traceback" not in str(error.value)
        output = tmp_path / f"skipped-{workers}"
        run(output, *changes, "data.on_error=skip", f"workers={workers}")
        assert len(log_of(output)) == 4
        assert log_of(output, "skipped_images")[4] == 1
        assert "1 of the images could not be used" in capsys.readouterr().out


def test_matching_costs_that_are_not_numbers_are_counted(run, tmp_path, monkeypatch):
    from proscale_hf.losses.segmentation import UniversalSegmentationLoss

    def spoilt(self, *arguments, cost=UniversalSegmentationLoss.matching_cost):
        costs = cost(self, *arguments)
        costs.view(-1)[:1] = float("nan")
        return costs

    run(tmp_path / "whole", "optimization.max_steps=2")
    assert not log_of(tmp_path / "whole", "non_finite_costs")
    monkeypatch.setattr(UniversalSegmentationLoss, "matching_cost", spoilt)
    run(tmp_path / "spoilt", "optimization.max_steps=2")
    assert log_of(tmp_path / "spoilt", "non_finite_costs") == {1: 4, 2: 8}  # one in each of the four images


def test_a_broken_model_is_not_saved(run, tmp_path):
    settings = ["optimization.learning_rate=1e30", "optimization.clip=null", "log_every=100", "checkpoint.every=2"]
    with pytest.raises(SystemExit, match="the loss is nan at step 2"):
        run(tmp_path / "out", *settings)
    assert not checkpoint.checkpoints(tmp_path / "out") and not list((tmp_path / "out").rglob("*.safetensors"))


def test_checkpoints_do_not_change_the_log(run, tmp_path):
    settings = ["optimization.max_steps=5", "log_every=5", "checkpoint.every=3"]
    run(tmp_path / "out", *settings)
    whole = log_of(tmp_path / "out")
    assert list(whole) == [3, 5]  # a resumed run knows nothing of the steps before
    checkpoint.checkpoints(tmp_path / "out")[-1].rename(tmp_path / "taken-away")
    run(tmp_path / "out", "--resume", *settings)
    assert log_of(tmp_path / "out") == pytest.approx(whole, abs=1e-5)


def test_another_runs_folder_is_not_overwritten(run, tmp_path):
    run(tmp_path / "out", "optimization.max_steps=2")
    with pytest.raises(SystemExit, match="add --resume"):
        run(tmp_path / "out", "optimization.max_steps=2")


def test_killed_and_resumed(run, recipe, tmp_path):
    run(tmp_path / "whole", "optimization.max_steps=12")
    arguments = ["data.validation=null", "optimization.max_steps=12"]
    with subprocess.Popen(
        command(recipe, tmp_path / "cut", *arguments), env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: checkpoint.checkpoints(tmp_path / "cut"), process)
        process.kill()
    unfinished = tmp_path / "cut" / "checkpoints" / ".step-00000099.partial"
    unfinished.mkdir()  # as if it had been killed while it saved
    run(tmp_path / "cut", "--resume", "optimization.max_steps=12")
    assert log_of(tmp_path / "cut") == pytest.approx(log_of(tmp_path / "whole"), abs=1e-5)
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(recipe, tmp_path, number):
    arguments = ["data.validation=null", "optimization.max_steps=100000", "checkpoint.every=100000", "workers=1"]
    with subprocess.Popen(
        command(recipe, tmp_path / "out", *arguments), env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for((tmp_path / "out" / "log.jsonl").exists, process)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    [folder] = checkpoint.checkpoints(tmp_path / "out")
    step = int(folder.name.removeprefix("step-"))
    assert f"error: stopped by a signal after step {step}, all is saved: go on with --resume" in errors
    assert "Traceback" not in errors


class Numbers(torch.utils.data.Dataset):
    """Says which index and epoch it was asked for, in the form of a training example."""

    epoch = 0

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return self.number

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        labels = torch.tensor([self.epoch, index])
        planes = torch.zeros(1, 32, 32, dtype=torch.uint8)
        return {"pixel_values": torch.zeros(3, 32, 32), "packed_masks": planes, "class_labels": labels}


def order_of(steps, first_step=0, device_batch_size=4, rank=0, processes=1, seed=0, images=11):
    recipe = Recipe(optimization=OptimizationSection(batch_size=4), seed=seed, workers=0)
    batches = training_batches(Numbers(images), recipe, device_batch_size, first_step, rank, processes)
    passes = 4 // (device_batch_size * processes)
    return [
        [tuple(labels.tolist()) for _ in range(passes) for labels in next(batches)["class_labels"]]
        for _ in range(steps)
    ]


def test_each_epoch_is_shuffled_anew_and_has_each_image_once():
    order = order_of(6)
    epochs = [[epoch for epoch, _ in batch] for batch in order]
    assert epochs == [[0] * 4] * 2 + [[1] * 4] * 2 + [[2] * 4] * 2
    indices = [[index for batch in order[start : start + 2] for _, index in batch] for start in (0, 2, 4)]
    assert all(len(set(part)) == 8 for part in indices)
    assert indices[0] != indices[1] != indices[2]
    assert order_of(6, seed=1) != order and order_of(6) == order


def test_the_order_can_be_entered_anywhere():
    order = order_of(6)
    for first_step in range(5):
        assert order_of(6 - first_step, first_step) == order[first_step:]


def test_the_images_of_an_update_do_not_depend_on_how_they_are_divided():
    joint = [set(batch) for batch in order_of(6)]
    assert [set(batch) for batch in order_of(6, device_batch_size=1)] == joint
    parts = [order_of(6, device_batch_size=2, rank=rank, processes=2) for rank in (0, 1)]
    assert [set(first) | set(second) for first, second in zip(*parts, strict=True)] == joint


def test_the_order_takes_nothing_from_the_global_random_numbers():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    order_of(6)
    assert torch.equal(torch.get_rng_state(), state)
