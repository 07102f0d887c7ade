"""What the models of all families share, beyond what their own tests see."""

import json
import shutil

import pytest
import torch

from helpers import tiny_config, tiny_model
from paths import ROOT
from proscale_hf import ProScaleMask2FormerForUniversalSegmentation


def test_transformers_converts_no_weights_and_copies_no_code():
    assert ProScaleMask2FormerForUniversalSegmentation.is_remote_code()
    assert not tiny_model().is_remote_code()


def test_a_class_of_a_user_is_saved_with_ours(tmp_path):
    class Mine(ProScaleMask2FormerForUniversalSegmentation):
        pass

    model = Mine(tiny_config())
    model.save_pretrained(tmp_path)
    name = "ProScaleMask2FormerForUniversalSegmentation"
    assert model.config.auto_map["AutoModelForUniversalSegmentation"] == f"modeling_proscale_mask2former.{name}"
    assert f"class {name}(" in (tmp_path / "modeling_proscale_mask2former.py").read_text()


def test_a_model_that_is_far_too_large_is_refused_before_anything_is_allocated(tmp_path):
    large = {"dim_feedforward": 2**20, "hidden_dim": 2**18, "decoder_layers": 2}
    with torch.device("meta"), pytest.raises(ValueError, match=r"asks for [0-9,]+ parameters; at most 10,000,000,000"):
        ProScaleMask2FormerForUniversalSegmentation(tiny_config(**large))
    shutil.copytree(ROOT / "proscale_hf" / "demo_model", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | large))
    with pytest.raises(ValueError, match="parameters; at most"):
        ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "model", ignore_mismatched_sizes=True)
