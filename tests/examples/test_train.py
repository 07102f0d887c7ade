"""`examples/train.py`: a recipe with transformers' `Trainer`, from start to finish, resumed, and killed."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
from transformers import AutoModelForUniversalSegmentation


pytest.importorskip("torchvision")  # augmentation needs it
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("accelerate")

from proscale_hf.hub.auto_classes import image_processor_class
from proscale_hf.training.recipe import load_recipe
from training_runs import EXAMPLES, environment, same_weights, wait_for, write_recipe


SCRIPT = EXAMPLES / "train.py"
QUIET = ("--disable_tqdm", "true", "--use_cpu")
HALF_WAY = (
    *QUIET,
    *("data.validation=null", "checkpoint.keep=9", "optimization.ema=0.9"),
    *("optimization.max_steps=4", "optimization.decay_at=[]"),
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture
def run(recipe, monkeypatch):
    """Runs the script in this process."""
    specification = importlib.util.spec_from_file_location("train", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "train", script)
    specification.loader.exec_module(script)

    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--config", str(recipe), *map(str, words)])
        script.main()

    return run


@pytest.fixture
def half_way(run, tmp_path_factory):
    """A checkpoint after two of four steps."""
    output = tmp_path_factory.mktemp("half-way")
    run("--output_dir", output, *HALF_WAY)
    return output / "checkpoint-2"


def logged(folder, name):
    """A value by step, as it was logged."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}


def test_script_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 200


def test_a_recipe_becomes_a_model(run, recipe, tmp_path):
    run("--output_dir", tmp_path, *QUIET, "optimization.ema=0.5", "evaluation.every=4")
    model, report = AutoModelForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert model.config.id2label[0] == "digit 0" and len(model.config.categories) == 13
    assert image_processor_class().from_pretrained(tmp_path).label_ids_to_fuse == [10, 11, 12]
    assert list(logged(tmp_path, "loss_dice")) == [1, 2, 3, 4, 5, 6]
    assert logged(tmp_path, "epoch")[6] == 3  # two batches in each, and two of the ten images are left out
    assert list(logged(tmp_path, "eval_pq")) == [4, 6]
    assert {"eval_ap", "eval_miou"} <= set(json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][-2])
    assert load_recipe(tmp_path / "recipe.yaml").optimization.ema == 0.5
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert not (tmp_path / ".unfinished").exists()


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_is_the_same_run(run, tmp_path, step):
    options = (*QUIET, "data.validation=null", "checkpoint.keep=9", "optimization.ema=0.9", "workers=1")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("--output_dir", whole, *options)
    cut.mkdir()
    (whole / f"checkpoint-{step}").rename(cut / f"checkpoint-{step}")
    run("--output_dir", cut, "--resume_from_checkpoint", "last", *options)
    for name in ("loss", "loss_cross_entropy", "loss_mask", "loss_dice", "learning_rate"):
        assert logged(cut, name) == pytest.approx(logged(whole, name), abs=1e-5)
    assert len(set(logged(whole, "loss").values())) == 6
    assert same_weights(whole, cut)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "average.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"]
)
@pytest.mark.parametrize("content", [b"", bytes(range(256)) * 9], ids=["empty", "garbage"])
def test_a_damaged_checkpoint_is_named(run, half_way, tmp_path, name, content):
    folder = shutil.copytree(half_way, tmp_path / half_way.name)
    (folder / name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"error: cannot resume from {folder}: .*delete it") as error:
        run("--output_dir", tmp_path, "--resume_from_checkpoint", "last", *HALF_WAY)
    assert len(error.value.code.splitlines()) == 1


def test_a_learning_rate_that_was_changed_counts(run, half_way, tmp_path):
    shutil.copytree(half_way, tmp_path / half_way.name)
    run("--output_dir", tmp_path, "--resume_from_checkpoint", "last", *HALF_WAY, "optimization.learning_rate=1e-5")
    assert logged(tmp_path, "learning_rate") == {1: 2.5e-4, 2: 5e-4, 3: 1e-5, 4: 1e-5}


@pytest.mark.slow
def test_a_killed_run_loses_nothing_but_the_step(run, recipe, tmp_path):
    options = (*QUIET, "data.validation=null", "checkpoint.every=1", "checkpoint.keep=9", "optimization.max_steps=12")
    run("--output_dir", tmp_path / "whole", *options)
    killed = tmp_path / "killed"
    command = [sys.executable, SCRIPT, "--config", recipe, "--output_dir", killed, *options]
    process = subprocess.Popen(
        list(map(str, command)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for((killed / "checkpoint-3").is_dir, process)
    process.kill()
    process.communicate()
    run("--output_dir", killed, "--resume_from_checkpoint", "last", *options)
    assert logged(killed, "loss") == pytest.approx(logged(tmp_path / "whole", "loss"), abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output_dir", "OUT", "--no_such_option", "1"], "--no_such_option"),
        (["--output_dir", "OUT", "--learning_rate", "1"], "write optimization.learning_rate=VALUE, without dashes"),
        (["--output_dir", "OUT", "--max-steps=1"], "write optimization.max_steps=VALUE"),
        ([], "give --output_dir"),
        (["--output_dir", "OUT", "optimization.leaning_rate=1"], "did you mean learning_rate?"),
        (["--output_dir", "OUT", "--config", "nowhere.yaml"], "cannot read the recipe nowhere.yaml"),
        (["--output_dir", "OUT", "data.train.images=nowhere"], "nowhere"),
        (["--output_dir", "OUT", "--report_to", "clearml"], "--report_to clearml needs a package"),
        (["--output_dir", "OUT", "--resume_from_checkpoint", "OUT"], "is no checkpoint"),
        (["--output_dir", "OLD"], "has checkpoints of another training"),
        (["--output_dir", "OUT", "optimization.max_steps=null"], "how long to train"),
        (["--output_dir", "OUT", "optimization.batch_size=11"], "10 images, but optimization.batch_size is 11"),
    ],
)
def test_errors_are_one_line(run, tmp_path, capsys, words, message):
    (tmp_path / "old" / "checkpoint-1").mkdir(parents=True)
    places = {"OUT": tmp_path / "out", "OLD": tmp_path / "old"}
    with pytest.raises(SystemExit) as error:
        run(*(places.get(word, word) for word in words))
    assert error.value.code not in (0, None)
    printed = error.value.code if isinstance(error.value.code, str) else capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_broken_model_is_not_saved(run, tmp_path):
    settings = ["optimization.learning_rate=1e30", "optimization.clip=null", "log_every=100", "data.validation=null"]
    with pytest.raises(SystemExit, match="the loss is nan at step 2"):
        run("--output_dir", tmp_path, *QUIET, *settings)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_unreadable_image_is_named(run, recipe, tmp_path):
    folder = recipe.parent / "train" / "images"
    broken = sorted(folder.iterdir())[0]
    content = broken.read_bytes()
    broken.write_bytes(content[:200])
    try:
        with pytest.raises(SystemExit, match=broken.name) as error:
            run("--output_dir", tmp_path / "out", *QUIET, "workers=1")
        assert len(error.value.code.splitlines()) == 1
        run("--output_dir", tmp_path / "skipped", *QUIET, "data.on_error=skip", "data.validation=null", "workers=1")
        assert max(logged(tmp_path / "skipped", "skipped_images").values()) == 1
    finally:
        broken.write_bytes(content)
