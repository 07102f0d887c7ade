"""A saved model with its code, as a Hub repository ships it, loads where this package is not installed."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from helpers import pixels, tiny_config
from proscale_hf import (
    ProScaleMask2FormerConfig,
    ProScaleMask2FormerForUniversalSegmentation,
    ProScaleMask2FormerImageProcessor,
)


LOAD = """
import sys
sys.modules["proscale_hf"] = None  # importing it is an error from here on
import torch
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation, pipeline

folder, inputs = sys.argv[1:]
model = AutoModelForUniversalSegmentation.from_pretrained(folder, trust_remote_code=True)
given, expected = torch.load(inputs)
with torch.no_grad():
    torch.testing.assert_close(model(given).masks_queries_logits, expected, rtol=1e-4, atol=1e-5)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
assert processor.label_ids_to_fuse == [2, 3]
segmenter = pipeline("image-segmentation", model=model, image_processor=processor)
assert isinstance(segmenter(folder + "/photo.png", threshold=0.1), list)
assert "transformers_modules" in type(model).__module__ and "transformers_modules" in type(processor).__module__
"""


@pytest.fixture
def auto_class_flags(monkeypatch):
    """`register_for_auto_class` marks classes for good; other tests should not save code."""
    for cls in (
        ProScaleMask2FormerConfig,
        ProScaleMask2FormerForUniversalSegmentation,
        ProScaleMask2FormerImageProcessor,
    ):
        monkeypatch.setattr(cls, "_auto_class", None)


@pytest.mark.slow
def test_a_saved_model_brings_its_code(tmp_path, auto_class_flags):
    pytest.importorskip("torchvision")
    ProScaleMask2FormerConfig.register_for_auto_class()
    ProScaleMask2FormerForUniversalSegmentation.register_for_auto_class("AutoModelForUniversalSegmentation")
    ProScaleMask2FormerImageProcessor.register_for_auto_class("AutoImageProcessor")
    folder = tmp_path / "my-model"
    model = ProScaleMask2FormerForUniversalSegmentation(tiny_config()).eval()
    model.save_pretrained(folder)
    ProScaleMask2FormerImageProcessor(label_ids_to_fuse=[2, 3], size={"height": 64, "width": 96}).save_pretrained(
        folder
    )
    Image.new("RGB", (50, 40), "teal").save(folder / "photo.png")
    with torch.no_grad():
        torch.save((pixels(), model(pixels()).masks_queries_logits), tmp_path / "inputs.pt")
    environment = {
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
        "HOME": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "inputs.pt")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
