"""Settings of image processors: what is possible passes, and everything else is named in one line."""

import json

import numpy as np
import pytest
from transformers.image_utils import PILImageResampling, SizeDict

from proscale_hf import ProScaleMask2FormerImageProcessorPil
from proscale_hf.processing.settings import SettingsError, check_settings


POSSIBLE = {
    "size": [{"shortest_edge": 800, "longest_edge": None}, 640, (480, 640), SizeDict(height=1, width=2), np.int64(7)],
    "pad_size": [{"height": 32, "width": 64}],
    "size_divisor": [0, 32],
    "resample": [2, PILImageResampling.LANCZOS],
    "rescale_factor": [1 / 255, 1, np.float32(0.5)],
    "image_mean": [0.5, [0, 0.5, 1], (-1, 0, 1), np.zeros(3)],
    "image_std": [0.5, [1, 2, 3]],
    "do_resize": [True, False],
    "ignore_index": [-1, 255],
    "num_labels": [1],
    "label_ids_to_fuse": [[], {3, 1}, (0,), range(3), np.arange(3)],
    "return_tensors": ["pt"],
}
IMPOSSIBLE = {
    "size": [{"shortest_edge": "800"}, {"height": -1}, 0, 1.5, "x", [], 10**9, {1: 2}, True],
    "pad_size": ["x", {"height": 0}],
    "size_divisor": [1.5, -1, "32", 10**9, [32]],
    "resample": [99, -1],
    "rescale_factor": ["x", 0, -1, float("nan"), float("inf"), 10**400, [1]],
    "image_mean": ["x", ["x"], [float("nan")], {}, []],
    "image_std": [0, [1, 0, 1], ["1"]],
    "do_resize": ["no", 2],
    "ignore_index": [1.5, "x", 2**40],
    "num_labels": [0, "x"],
    "label_ids_to_fuse": ["x", [-1], ["1"], 3, [1.5]],
}


def cases(table):
    return pytest.mark.parametrize(("name", "value"), [(name, value) for name in table for value in table[name]])


@cases(POSSIBLE)
def test_possible(name, value):
    check_settings({name: value})
    check_settings({name: None})


@cases(IMPOSSIBLE)
def test_impossible(name, value):
    with pytest.raises(SettingsError, match=f"^`{name}` must be ") as error:
        check_settings({name: value})
    assert str(error.value).isprintable() and len(str(error.value)) < 250


def test_mean_and_deviation_belong_together():
    with pytest.raises(SettingsError, match="`image_mean` has 3 numbers, and `image_std` has 1"):
        check_settings({"image_mean": [0, 0, 0], "image_std": [1]})


def test_they_are_checked_wherever_they_come_from(tmp_path):
    processor = ProScaleMask2FormerImageProcessorPil()
    with pytest.raises(ValueError, match=r"^`size_divisor` must be"):
        processor(np.zeros((4, 4, 3), np.uint8), size_divisor=1.5)
    with pytest.raises(ValueError, match=r"^`size_divisor` must be"):
        ProScaleMask2FormerImageProcessorPil(size_divisor=1.5)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": "x"}))
    with pytest.raises(ValueError, match=r"^preprocessor_config\.json of .*: `image_mean` must be a number, or a list"):
        ProScaleMask2FormerImageProcessorPil.from_pretrained(tmp_path)
