"""A conversion takes at most 2.5 times the checkpoint's size in memory."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from detectron2_zoo import IMAGE_MODELS, checkpoint, write_configuration
from paths import ROOT


MEASURE = """
import sys
import tempfile
import torch
from proscale_hf.convert.detectron2 import convert_checkpoint
from proscale_hf.convert.output import write_model_folder

def bytes_of(entry):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(entry)).split()[1])

def convert(path):
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(*convert_checkpoint(config, path), folder + "/output")

torch.set_num_threads(1)
_, config, warm_up, *paths = sys.argv
convert(warm_up)  # imports what is imported late
for path in paths:
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
    before = bytes_of("VmRSS")
    convert(path)
    print("peak", bytes_of("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure memory")
def test_peak(tmp_path):
    entry = next(entry for entry in IMAGE_MODELS if entry.path.endswith("res50_proscale_3_3_3_coco.yaml"))
    state = dict(checkpoint(entry.architecture, "cpu"))
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    optimizer = {index: {"exp_avg": tensor, "exp_avg_sq": tensor + 1} for index, tensor in enumerate(state.values())}
    for name, content, zipped in (
        ("zip.pth", {"model": state}, True),
        ("zip, 16 bit.pth", {"model": half}, True),
        ("zip, optimizer.pth", {"model": {name: tensor + 1 for name, tensor in state.items()}, "o": optimizer}, True),
        ("old, 16 bit.pth", {"model": half}, False),
    ):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with (tmp_path / "arrays, 16 bit.pkl").open("wb") as file:
        pickle.dump({name: tensor.numpy() for name, tensor in half.items()}, file)
    config = write_configuration(entry, tmp_path)
    paths = sorted(tmp_path.glob("*.p*"))
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(config), str(tmp_path / "zip.pth"), *map(str, paths)],
        # glibc would otherwise keep what is freed, and one measurement would hide the next
        env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    peaks = [int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("peak")]
    ratios = {path.name: peak / path.stat().st_size for path, peak in zip(paths, peaks, strict=True)}
    assert all(ratio < 2.5 for ratio in ratios.values()), ratios
    assert ratios["zip, optimizer.pth"] < 0.6, "the optimizer's state was read"
