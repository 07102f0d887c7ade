"""What both training scripts do alike: resuming, checkpoints that are whole, faults in one line."""

import errno
import os
import pickle
import resource
import shutil
import subprocess
import sys

import pytest
import torch
import yaml


pytest.importorskip("torchvision")  # augmentation needs it
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("accelerate")

from proscale_hf.training.checkpoint import checkpoints
from training_runs import LOOP, TRAINER, environment, files_of, same_weights, wait_for, write_recipe


WITHOUT_VALIDATION = "data.validation=null"
HALF_WAY = (WITHOUT_VALIDATION, "optimization.ema=0.9", "optimization.max_steps=4", "optimization.decay_at=[]")
OPTIMIZER = {LOOP: "optimizer.bin", TRAINER: "optimizer.pt"}
RANDOM_STATES = {LOOP: "random_states_0.pkl", TRAINER: "rng_state.pth"}

both_scripts = pytest.mark.parametrize("script", [LOOP, TRAINER], ids=lambda script: script.name)


def cases(**names):
    """Pairs of a script and a name for `parametrize`."""
    scripts = {"loop": LOOP, "trainer": TRAINER}
    return [pytest.param(scripts[key], name, id=f"{key}-{name}") for key, some in names.items() for name in some]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def half_way(recipe, tmp_path_factory):
    """Copies a checkpoint, made after two of four steps, into an output folder."""
    made = {}

    def copy(script, output):
        if script not in made:
            folder = made[script] = tmp_path_factory.mktemp("half-way")
            script.run(recipe, folder, *HALF_WAY, "checkpoint.keep=9")
        return shutil.copytree(script.checkpoint(made[script], 2), script.checkpoint(output, 2))

    return copy


@both_scripts
def test_script_is_short(script):
    assert len(script.path.read_text().splitlines()) < 200


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        (LOOP, ["optimization.ema=0.9"]),
        (LOOP, ["optimization.device_batch_size=2", "model.config.dropout=0.1"]),
        (LOOP, ["workers=1", "optimization.precision=bf16"]),
        (TRAINER, ["optimization.ema=0.9", "workers=1"]),
    ],
    ids=["loop-ema", "loop-accumulation-and-dropout", "loop-workers-and-bf16", "trainer-ema-and-workers"],
)
def test_a_resumed_run_is_the_same_run(recipe, tmp_path, script, changes):
    words = (WITHOUT_VALIDATION, "checkpoint.every=1", "checkpoint.keep=9", *changes)
    script.run(recipe, tmp_path / "whole", *words)
    assert list(script.log_of(tmp_path / "whole")) == [1, 2, 3, 4, 5, 6]
    assert len(set(script.log_of(tmp_path / "whole").values())) == 6
    for step in (3, 4):  # in the middle of the second epoch, and at its end
        cut = tmp_path / f"from-{step}"
        shutil.copytree(script.checkpoint(tmp_path / "whole", step), script.checkpoint(cut, step))
        script.run(recipe, cut, *words, *script.to_resume)
        assert set(script.log_of(cut)) >= set(range(step + 1, 7))
        for name in ("loss", "loss_cross_entropy", "loss_mask", "loss_dice", "learning_rate"):
            whole, resumed = script.log_of(tmp_path / "whole", name), script.log_of(cut, name)
            assert resumed == pytest.approx({step: whole[step] for step in resumed}, abs=1e-5)
        assert same_weights(tmp_path / "whole", cut)


@both_scripts
def test_a_learning_rate_that_was_changed_counts(recipe, half_way, tmp_path, script):
    half_way(script, tmp_path)
    changes = ("optimization.learning_rate=1e-5", "optimization.decay_at=[0.75]")
    script.run(recipe, tmp_path, *HALF_WAY, *changes, *script.to_resume)
    rates = script.log_of(tmp_path, "learning_rate")
    assert (rates[3], rates[4]) == pytest.approx((1e-5, 1e-6))


@pytest.mark.parametrize(
    "script", [LOOP, pytest.param(TRAINER, marks=pytest.mark.slow)], ids=lambda script: script.name
)
def test_a_killed_run_loses_nothing_but_the_step(recipe, tmp_path, script):
    words = (WITHOUT_VALIDATION, "optimization.max_steps=12")
    script.run(recipe, tmp_path / "whole", *words)
    killed = tmp_path / "killed"
    with subprocess.Popen(
        [sys.executable, *script.words(recipe, killed, *words)], env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: checkpoints(killed, script.prefix), process)
        process.kill()
    unfinished = script.checkpoint(killed, 99).parent / ".unfinished" / script.checkpoint(killed, 99).name
    unfinished.mkdir(parents=True, exist_ok=True)  # as if it had been killed while it saved
    script.run(recipe, killed, *words, *script.to_resume)
    assert script.log_of(killed) == pytest.approx(script.log_of(tmp_path / "whole"), abs=1e-5)
    assert same_weights(tmp_path / "whole", killed)
    assert not list(killed.rglob(".*"))


@pytest.mark.parametrize("largest", ["model", "optimizer"])
@both_scripts
def test_a_full_disk_leaves_the_checkpoint_before_it_whole(recipe, half_way, tmp_path, script, largest):
    """No file can become as large as the one that is named."""
    checkpoint = half_way(script, tmp_path)
    before = files_of(checkpoint)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (checkpoint / ("model.safetensors" if largest == "model" else OPTIMIZER[script])).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, limits[1]))
    try:
        with pytest.raises(SystemExit) as error:
            script.run(recipe, tmp_path, *HALF_WAY, *script.to_resume, "checkpoint.keep=1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(error.value)
    assert message.startswith(f"error: cannot write {script.checkpoint(tmp_path, 4)}: ") and "\n" not in message
    assert message.endswith("; what was saved before is whole")
    assert files_of(checkpoint) == before and checkpoints(tmp_path, script.prefix) == [checkpoint]
    assert not list(tmp_path.rglob(".*"))
    script.run(recipe, tmp_path, *HALF_WAY, *script.to_resume, "checkpoint.keep=1")
    assert checkpoints(tmp_path, script.prefix) == [script.checkpoint(tmp_path, 4)]


@both_scripts
def test_a_disk_that_says_at_last_that_it_is_full(recipe, half_way, tmp_path, monkeypatch, script):
    def full(file):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    checkpoint = half_way(script, tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match=f"cannot write {script.checkpoint(tmp_path, 4)}: .*Disk quota exceeded"):
        script.run(recipe, tmp_path, *HALF_WAY, *script.to_resume)
    assert checkpoints(tmp_path, script.prefix) == [checkpoint] and not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    ("script", "name"),
    cases(
        loop=[
            *("model.safetensors", "average.safetensors", "optimizer.bin", "scheduler.bin"),
            *("random_states_0.pkl", "progress.json"),
        ],
        trainer=[
            *("model.safetensors", "average.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
            *("config.json", "trainer_state.json"),
        ],
    ),
)
@pytest.mark.parametrize("content", [b"", bytes(range(256)) * 9], ids=["empty", "garbage"])
def test_a_damaged_checkpoint_is_named(recipe, half_way, tmp_path, script, name, content):
    checkpoint = half_way(script, tmp_path)
    (checkpoint / name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"error: cannot resume from {checkpoint}: .*delete it") as error:
        script.run(recipe, tmp_path, *HALF_WAY, *script.to_resume)
    assert len(str(error.value).splitlines()) == 1


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    ("script", "name"),
    cases(
        loop=["optimizer.bin", "ema.pt", "custom_checkpoint_0.pkl", "random_states_0.pkl"],
        trainer=["optimizer.pt", "scheduler.pt", "rng_state.pth"],
    ),
)
@pytest.mark.parametrize("save", [torch.save, lambda harm, file: file.write_bytes(pickle.dumps(harm))])
def test_nothing_in_a_checkpoint_is_executed(recipe, half_way, tmp_path, script, name, save):
    checkpoint = half_way(script, tmp_path)
    if name == "ema.pt":  # which version 0.1 had in place of it
        (checkpoint / "average.safetensors").unlink()
    save(Harm(tmp_path / "harm"), checkpoint / name)
    with pytest.raises(SystemExit, match="error: cannot resume from"):
        script.run(recipe, tmp_path, *HALF_WAY, *script.to_resume)
    assert not (tmp_path / "harm").exists()


@both_scripts
def test_a_broken_model_is_not_saved(recipe, tmp_path, script):
    changes = ["optimization.learning_rate=1e17", "optimization.clip=null", "log_every=100", "checkpoint.every=2"]
    with pytest.raises(SystemExit, match="the loss is nan at step 2: lower the learning rate"):
        script.run(recipe, tmp_path, WITHOUT_VALIDATION, *changes)
    assert not checkpoints(tmp_path, script.prefix) and not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("script", "part", "name"),
    [
        (LOOP, "images", "000004.png"),
        (LOOP, "segment_maps", "000007.png"),
        (TRAINER, "images", "000004.png"),
    ],
    ids=["loop-image", "loop-segment-map", "trainer-image"],
)
def test_what_cannot_be_read_is_named_or_skipped(recipe, tmp_path, capsys, script, part, name):
    files = tmp_path / "files"
    shutil.copytree(yaml.safe_load(recipe.read_text())["data"]["train"][part], files)
    (files / name).write_bytes((files / name).read_bytes()[:200])
    changes = [WITHOUT_VALIDATION, f"data.train.{part}={files}", "optimization.max_steps=4"]
    for workers in (0, 1):
        with pytest.raises(SystemExit, match=name) as error:
            script.run(recipe, tmp_path / f"out-{workers}", *changes, f"workers={workers}")
        message = str(error.value)
        assert message.startswith("error: ") and "\n" not in message and "Traceback" not in message
        output = tmp_path / f"skipped-{workers}"
        script.run(recipe, output, *changes, "data.on_error=skip", f"workers={workers}")
        assert len(script.log_of(output)) == 4
        assert script.log_of(output, "skipped_images")[4] == 1
        assert ("1 of the images could not be used" in capsys.readouterr().out) == (script is LOOP)


FAULTS_OF_RECIPES = [
    (["data.train.images=nowhere"], "nowhere"),
    (["optimization.leaning_rate=1"], "did you mean learning_rate?"),
    (["--config", "nowhere.yaml"], "there is no recipe nowhere.yaml"),
    (["optimization.max_steps=null"], "how long to train"),
    (["optimization.batch_size=11"], "10 images, but optimization.batch_size is 11"),
]
FAULTS = {
    LOOP: [
        (["data.train.annotations=nowhere.json"], "nowhere.json"),
        (["data.train.rot=x"], "no option rot"),
        (["data.train.name=coco"], "no data set 'coco'"),
        (["optimization.device_batch_size=3"], "is no multiple of"),
        (["model.config.num_queries=0"], "num_queries"),
        (["augmentation.crop=3"], "crop"),
        (["--report_to", "nobody"], "there is no tracker nobody"),
        (["--push_to_hub", "no good name"], "cannot be a repository"),
        (["--output_dir", "OLD"], "OLD has checkpoints of another training: add --resume, or"),
    ],
    TRAINER: [
        (["--no_such_option", "1"], "--no_such_option"),
        (["--learning_rate", "1"], "write optimization.learning_rate=VALUE, without dashes"),
        (["--max-steps=1"], "write optimization.max_steps=VALUE"),
        (["--report_to", "clearml"], "--report_to clearml needs a package"),
        (["--resume_from_checkpoint", "OUT"], "is no checkpoint"),
        (["--output_dir", "OLD"], "OLD has checkpoints of another training: add --resume_from_checkpoint last, or"),
    ],
}


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        pytest.param(script, words, message, id=f"{script.name}-{' '.join(words)}")
        for script in (LOOP, TRAINER)
        for words, message in FAULTS_OF_RECIPES + FAULTS[script]
    ],
)
def test_errors_are_one_line(recipe, tmp_path, capsys, script, words, message):
    places = {"OUT": str(tmp_path / "out"), "OLD": str(tmp_path / "old")}
    script.checkpoint(tmp_path / "old", 1).mkdir(parents=True)
    with pytest.raises(SystemExit) as error:
        script.run(recipe, tmp_path / "out", *(places.get(word, word) for word in words))
    assert error.value.code not in (0, None)
    printed = error.value.code if isinstance(error.value.code, str) else capsys.readouterr().err
    assert printed.startswith("error: ") and message.replace("OLD", places["OLD"]) in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
