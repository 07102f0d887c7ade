"""The rules of checkpoints: which there are, which one is resumed, which ones go, and what is in them."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn


pytest.importorskip("accelerate")
pytest.importorskip("yaml")

from proscale_hf.training.checkpoint import (
    CheckpointError,
    Progress,
    checkpoints,
    choose_checkpoint,
    delete_old,
    differences,
    load_average,
    reading,
    save_average,
    saving,
)
from proscale_hf.training.ema import create_ema


@pytest.fixture(params=["checkpoints/step-", "checkpoint-"])
def prefix(request):
    return request.param


@pytest.fixture
def output(tmp_path, prefix):
    """Two checkpoints, and what is none."""
    for name in ("10", "9", "9.partial", "old"):
        (tmp_path / f"{prefix}{name}").mkdir(parents=True)
    (tmp_path / f"{prefix}11").touch()
    (tmp_path / f"{prefix}1").parent.joinpath(".unfinished", "checkpoint-12").mkdir(parents=True)
    return tmp_path


def test_checkpoints_come_in_the_order_of_their_steps(output, prefix):
    assert checkpoints(output, prefix) == [output / f"{prefix}9", output / f"{prefix}10"]
    assert checkpoints(output / "nowhere", prefix) == []


def test_the_checkpoint_to_resume(output, prefix):
    assert choose_checkpoint(output, "last", "--resume", prefix) == output / f"{prefix}10"
    assert choose_checkpoint(output, str(output / "other"), "--resume", prefix) == output / "other"
    with pytest.raises(CheckpointError, match=f"{output} has checkpoints of another training: add --resume, or"):
        choose_checkpoint(output, None, "--resume", prefix)
    for resume in ("last", None):
        assert choose_checkpoint(output / "new", resume, "--resume", prefix) is None


@pytest.mark.parametrize(
    ("keep", "needed", "left"),
    [
        (3, [4], [2, 3, 4]),
        (1, [4], [4]),
        (2, [4, 1], [1, 4]),  # the last and the best
        (1, [4, 1], [1, 4]),
        (1, [2], [2]),  # written again, after going back
        (9, [4], [1, 2, 3, 4]),
    ],
)
def test_those_with_the_fewest_steps_go(tmp_path, keep, needed, left):
    folders = {step: tmp_path / f"checkpoint-{step}" for step in (1, 2, 3, 4)}
    for folder in folders.values():
        folder.mkdir()
        (folder / "file").touch()
    delete_old(checkpoints(tmp_path, "checkpoint-"), keep, [folders[step] for step in needed])
    assert checkpoints(tmp_path, "checkpoint-") == [folders[step] for step in left]


@pytest.mark.parametrize("name", ["average.safetensors", "ema.pt", None])
def test_an_average_comes_back_or_begins_anew(tmp_path, name):
    """From a checkpoint, from one of version 0.1, and from one that has none."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    ema = create_ema(model, 0.9)
    for _ in range(3):
        nn.init.normal_(model.weight)
        ema.update_parameters(model)
    expected, updates = (model.weight, 0) if name is None else (ema.module.weight, 3)
    save_average(ema, tmp_path)
    if name == "ema.pt":
        torch.save(load_file(tmp_path / "average.safetensors"), tmp_path / name)
    if name != "average.safetensors":
        (tmp_path / "average.safetensors").unlink()
    restored = create_ema(nn.Linear(2, 2), 0.9)
    load_average(restored, tmp_path, model)
    assert torch.equal(restored.module.weight, expected) and restored.n_averaged == updates


def test_errors_are_one_line_that_names_the_folder(tmp_path):
    resume = rf"^cannot resume from {tmp_path}: first; if it is damaged, delete it"
    with pytest.raises(CheckpointError, match=resume), reading(tmp_path):
        raise RuntimeError("first\nsecond")
    write = rf"^cannot write {tmp_path}: first \(is the disk full\?\); what was saved before is whole$"
    with pytest.raises(CheckpointError, match=write), saving(tmp_path):
        raise RuntimeError("first\nsecond")
    with pytest.raises(torch.OutOfMemoryError), reading(tmp_path):
        raise torch.OutOfMemoryError("no checkpoint's fault")


def test_progress_knows_the_best():
    progress = Progress()
    assert [progress.is_new_best(value) for value in (0.1, 0.3, 0.3, 0.2, 0.4)] == [True, True, False, False, True]
    assert (progress.best, progress.evaluations_without_best) == (0.4, 0)


def test_differences_of_recipes_have_full_names():
    before = {"seed": 0, "model": {"preset": "a", "config": {"x": 1}}, "gone": 1}
    now = {"seed": 0, "model": {"preset": "b", "config": {"x": 2}}, "new": 1}
    assert differences(before, now) == ["model.preset", "model.config.x", "gone", "new"]
