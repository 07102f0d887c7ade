"""Trainings small enough for a test: their recipe, with scenes to train on, and what they leave."""

import json
import os
import time

import torch
import yaml
from safetensors.torch import load_file

from demo_scenes import DemoScenes, write_scenes
from paths import EXAMPLES, ROOT


SCRIPT = EXAMPLES / "train_accelerate.py"

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


def log_of(output, name="loss"):
    """A value by step, as it was logged."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def same_weights(first, second):
    first, second = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
