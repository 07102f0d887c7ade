"""Trainings small enough for a test: their recipe, with scenes to train on, and what they leave."""

import importlib.util
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from unittest import mock

import torch
import yaml
from safetensors.torch import load_file

import paths
from demo_scenes import DemoScenes, write_scenes


EXAMPLES, ROOT = paths.EXAMPLES, paths.ROOT

TINY = {
    "base": str(EXAMPLES / "configs" / "demo_scenes.yaml"),
    "model": {
        "config": {
            "backbone_config": {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
            **dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32),
            **dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 32),
            **{"num_attention_heads": 4, "decoder_layers": 4, "num_queries": 8, "train_num_points": 64},
        }
    },
    "augmentation": {"short_edge": [64, 80], "crop": [64, 64], "flip": 0.5},
    "image_processor": {"size": {"shortest_edge": 64, "longest_edge": 64}},
    "optimization": {"max_steps": 6, "batch_size": 4, "warmup_steps": 1},
    "evaluation": {"every": 2},
    "checkpoint": {"every": 2},
    "log_every": 1,
    "workers": 0,
}


def write_recipe(folder):
    """A file: ten scenes for training, so that an epoch has two steps and a rest; three for validation."""
    data = {}
    for part, split, number in (("train", "train", 10), ("validation", "held-out", 3)):
        scenes = folder / part
        write_scenes(DemoScenes(number, split, size=(128, 128)), scenes)
        data[part] = {
            "images": str(scenes / "images"),
            "annotations": str(scenes / "panoptic.json"),
            "segment_maps": str(scenes / "panoptic"),
        }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": data}))
    return path


def environment(**more):
    """Of a process that runs a script of this working copy."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


@dataclass(frozen=True)
class Script:
    """One of the two scripts that train by a recipe."""

    name: str
    prefix: str  # of its checkpoints
    digits: int
    options: tuple[str, ...]
    to_resume: tuple[str, ...]

    @property
    def path(self):
        return EXAMPLES / f"{self.name}.py"

    def words(self, recipe, output, *words):
        place = () if output is None else ("--output_dir", output)
        return list(map(str, [self.path, "--config", recipe, *place, *self.options, *words]))

    def run(self, recipe, output, *words, **replacements):
        """In this process; `replacements` take the place of what the script has imported."""
        from accelerate.state import AcceleratorState, GradientState

        specification = importlib.util.spec_from_file_location(self.name, self.path)
        module = importlib.util.module_from_spec(specification)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        sys.modules[self.name] = module  # where dataclasses look for it
        try:
            specification.loader.exec_module(module)
            vars(module).update(replacements)
            with mock.patch.object(sys, "argv", self.words(recipe, output, *words)):
                module.main()
        finally:
            del sys.modules[self.name]
            for number, handler in handlers.items():
                signal.signal(number, handler)
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()

    def checkpoint(self, output, step):
        """The folder of a checkpoint."""
        return output / f"{self.prefix}{step:0{self.digits}d}"

    def log_of(self, output, name="loss"):
        """A value by step, as it was logged."""
        if self is LOOP:
            return log_of(output, name)
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        return {entry["step"]: entry[name] for entry in history if name in entry}


LOOP = Script("train_accelerate", "checkpoints/step-", 8, (), ("--resume",))
TRAINER = Script(
    "train", "checkpoint-", 1, ("--disable_tqdm", "true", "--use_cpu"), ("--resume_from_checkpoint", "last")
)


def log_of(output, name="loss"):
    """A value by step, as the plain loop logged it."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def files_of(folder):
    """Contents by path."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_weights(first, second):
    first, second = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
