"""The plain loop in two processes, started as on two GPUs, with gloo on the CPU.

Processes draw other points for the loss, by design; where results are compared with one process's, `torch.rand` gives
all the same ones. That the model then has the same gradients is `test_distributed.py`'s matter.
"""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from helpers import TINY_RESNET, TINY_SWIN


pytest.importorskip("torchvision")  # augmentation needs it
pytest.importorskip("accelerate")

import psutil

from proscale_hf import ProScaleMask2FormerForUniversalSegmentation
from proscale_hf.training.checkpoint import checkpoints
from training_runs import EXAMPLES, LOOP, environment, log_of, wait_for, write_recipe


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch without gloo"),
]
CONFIGS = EXAMPLES / "configs" / "accelerate"
LONG = ["optimization.max_steps=100000", "checkpoint.every=3"]

# Runs the script with the same random points for each mask, and keeps each process's weights.
COMPARABLE = """
import os, runpy, sys, torch
from accelerate import Accelerator
from safetensors.torch import save_file

def same_points(*size, generator=None, **options):
    return torch.empty(*size, **options).uniform_(generator=torch.Generator().manual_seed(3))

def end_training(accelerator, end=Accelerator.end_training):
    weights = accelerator.unwrap_model(accelerator._models[0]).state_dict()
    save_file(weights, f"{os.environ['FOLDER']}/{accelerator.process_index}-of-{accelerator.num_processes}.safetensors")
    end(accelerator)

torch.rand, Accelerator.end_training = same_points, end_training
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# accelerate shards on GPUs alone; here a CPU passes for one. Gloo has no mean.
SHARDED = """
import runpy, sys
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed import fsdp

def fully_shard(module, *rest, shard=fsdp.fully_shard, **options):
    shard(module, *rest, **options).set_force_sum_reduction_for_comms(True)
    return module

fsdp.fully_shard = fully_shard
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def command(processes, recipe, output, *arguments, script=(), config="8_gpus.yaml"):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    launch += ["--num_processes", str(processes), "--main_process_port", "0", *map(str, script), str(LOOP.path)]
    return [*launch, "--config", str(recipe), "--output_dir", str(output), "data.validation=null", *arguments]


def started(recipe, output, *arguments):
    return subprocess.Popen(
        command(2, recipe, output, *arguments),
        env=environment(ACCELERATE_USE_CPU="true"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(processes, recipe, output, *arguments, script=(), config="8_gpus.yaml", **variables):
    result = subprocess.run(
        command(processes, recipe, output, *arguments, script=script, config=config),
        env=environment(ACCELERATE_USE_CPU="true", **variables),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr
    return result


def settings(name, values):
    """A dictionary as overrides of a recipe."""
    return [f"{name}.{key}={value}".replace("'", "") for key, value in values.items()]


@pytest.mark.parametrize("backbone", [TINY_SWIN, TINY_RESNET], ids=["swin", "resnet"])
def test_two_processes_equal_one(recipe, tmp_path, backbone):
    script = tmp_path / "comparable.py"
    script.write_text(COMPARABLE)
    arguments = [*settings("model.config.backbone_config", backbone), "model.config.freeze_backbone_batch_norm=true"]
    for processes in (1, 2):
        finished(processes, recipe, tmp_path / str(processes), *arguments, script=[script], FOLDER=str(tmp_path))
    losses = [log_of(tmp_path / str(processes)) for processes in (1, 2)]
    assert list(losses[1]) == [1, 2, 3, 4, 5, 6]  # one process writes
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    first, second = (load_file(tmp_path / f"{rank}-of-2.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_resume(recipe, tmp_path):
    output = tmp_path / "out"
    finished(2, recipe, output, "checkpoint.every=3", "model.config.dropout=0.1")
    whole, weights = log_of(output), load_file(output / "model.safetensors")
    checkpoints(output)[-1].rename(tmp_path / "taken-away")
    finished(2, recipe, output, "checkpoint.every=3", "model.config.dropout=0.1", "--resume")
    assert log_of(output) == pytest.approx(whole, abs=1e-5)
    torch.testing.assert_close(load_file(output / "model.safetensors"), weights, rtol=0, atol=1e-6)


def test_sharded_training_is_the_same_and_resumes(recipe, tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    sharded = {"script": [script], "config": "fsdp.yaml"}
    arguments = ["checkpoint.every=3", "optimization.precision=bf16"]
    finished(2, recipe, tmp_path / "whole", *arguments)
    finished(2, recipe, tmp_path / "sharded", *arguments, **sharded)
    checkpoints(tmp_path / "sharded")[-1].rename(tmp_path / "taken-away")
    assert (tmp_path / "taken-away" / "pytorch_model_fsdp.bin").is_file()
    finished(2, recipe, tmp_path / "sharded", *arguments, "--resume", **sharded)
    assert log_of(tmp_path / "sharded") == pytest.approx(log_of(tmp_path / "whole"), rel=1e-5)

    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "sharded").iterdir()} == files  # nothing of FSDP
    whole, saved = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "sharded"))
    assert saved["auto_map"] == whole["auto_map"] and saved["architectures"] == whole["architectures"]
    ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "sharded")


def test_a_killed_process_ends_all(recipe, tmp_path):
    output = tmp_path / "out"
    with started(recipe, output, *LONG) as launcher:
        wait_for(lambda: checkpoints(output), launcher)
        workers = psutil.Process(launcher.pid).children()
        assert len(workers) == 2
        workers[1].kill()
        launcher.communicate(timeout=90)
    assert launcher.returncode != 0
    assert not psutil.wait_procs(workers, timeout=10)[1]
    steps = int(checkpoints(output)[-1].name.removeprefix("step-"))
    before = log_of(output)
    finished(2, recipe, output, f"optimization.max_steps={steps + 1}", "checkpoint.every=3", "--resume")
    assert list(log_of(output))[-1] == steps + 1 and before.items() <= {**log_of(output), **before}.items()


def test_a_signal_stops_all_after_the_same_step(recipe, tmp_path):
    output = tmp_path / "out"
    with started(recipe, output, "optimization.max_steps=100000", "checkpoint.every=100000") as launcher:
        wait_for((output / "log.jsonl").exists, launcher)
        launcher.send_signal(signal.SIGTERM)
        errors = launcher.communicate(timeout=90)[1]
    assert launcher.returncode != 0
    [folder] = checkpoints(output)
    step = int(folder.name.removeprefix("step-"))
    assert f"error: stopped by a signal after step {step}, all is saved" in errors
    finished(2, recipe, output, f"optimization.max_steps={step + 1}", "--resume")
    assert list(log_of(output)) == list(range(1, step + 2))


def test_parameters_without_use_are_one_line(recipe, tmp_path):
    backbone = {
        **{"model_type": "bit", "embedding_size": 16, "hidden_sizes": [16] * 4, "depths": [1] * 4, "num_groups": 4},
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    with started(recipe, tmp_path, *settings("model.config.backbone_config", backbone)) as launcher:
        errors = launcher.communicate(timeout=90)[1]
    assert launcher.returncode != 0
    assert "error: parts of this backbone are unused" in errors
    assert "finished reduction" not in errors
