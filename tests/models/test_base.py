"""What the models of all families share, beyond what their own tests see."""

from helpers import tiny_config, tiny_model
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
