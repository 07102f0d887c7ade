"""`examples/train.py` alone; what both training scripts do is in test_train_scripts.py."""

import json

import pytest
from transformers import AutoModelForUniversalSegmentation


pytest.importorskip("torchvision")  # augmentation needs it
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("accelerate")

from proscale_hf.hub.auto_classes import image_processor_class
from proscale_hf.training.recipe import load_recipe
from training_runs import TRAINER, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def test_a_recipe_becomes_a_model(recipe, tmp_path):
    TRAINER.run(recipe, tmp_path, "optimization.ema=0.5", "evaluation.every=4")
    model, report = AutoModelForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert model.config.id2label[0] == "digit 0" and len(model.config.categories) == 13
    assert image_processor_class().from_pretrained(tmp_path).label_ids_to_fuse == [10, 11, 12]
    assert list(TRAINER.log_of(tmp_path, "loss_dice")) == [1, 2, 3, 4, 5, 6]
    assert TRAINER.log_of(tmp_path, "epoch")[6] == 3  # two batches in each, and two of the ten images are left out
    assert list(TRAINER.log_of(tmp_path, "eval_pq")) == [4, 6]
    assert {"eval_ap", "eval_miou"} <= set(json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][-2])
    assert load_recipe(tmp_path / "recipe.yaml").optimization.ema == 0.5
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert not list(tmp_path.rglob(".*"))


def test_a_folder_is_needed(recipe):
    with pytest.raises(SystemExit, match="error: give --output_dir"):
        TRAINER.run(recipe, None)
