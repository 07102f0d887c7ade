"""From a recipe to data sets, model and image processor."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, SwinConfig, SwinForImageClassification

from helpers import TINY_RESNET, TINY_SWIN, tiny_config
from paths import ROOT
from proscale_hf import ProScaleMask2FormerForUniversalSegmentation
from proscale_hf.training.recipe import ModelSection, Recipe, RecipeError, load_recipe


pytest.importorskip("torchvision")  # augmentation needs it
from proscale_hf.training.setup import (
    create_config,
    create_image_processor,
    load_datasets,
    load_model_and_processor,
    training_set,
)


DEMO_MODEL = str(ROOT / "proscale_hf" / "demo_model")
CATEGORIES = [
    {"id": 7, "name": "cat", "isthing": 1, "color": [255, 0, 0]},
    {"id": 9, "name": "sky", "isthing": 0, "color": [0, 0, 255]},
    {"id": 3, "name": "dog", "isthing": 1, "color": [0, 255, 0]},
]


def tiny_recipe(**model) -> Recipe:
    config = {name: value for name, value in tiny_config().to_dict().items() if name in TINY_FIELDS}
    return Recipe(model=ModelSection(**{"config": config, **model}))


TINY_FIELDS = (
    "encoder_stage_layers",
    "encoder_feedforward_dim",
    "feature_size",
    "mask_feature_size",
    "hidden_dim",
    "num_attention_heads",
    "dim_feedforward",
    "decoder_layers",
    "num_queries",
    "backbone_config",
)


def weights_of(model, prefix=""):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(prefix)}


def test_a_new_model_has_the_datas_classes():
    model, processor = load_model_and_processor(tiny_recipe(), CATEGORIES)
    assert model.config.id2label == {0: "cat", 1: "sky", 2: "dog"}
    assert model.config.label2id == {"cat": 0, "sky": 1, "dog": 2}
    assert model.config.category(2)["id"] == 3
    assert model.class_predictor.out_features == 4
    assert list(processor.label_ids_to_fuse) == [1]
    assert model.training and model.dtype == torch.float32


def test_a_preset_with_fields_merged_over_it():
    config = {"num_queries": 9, "backbone_config": {"depths": [1, 1, 1, 1]}}
    recipe = Recipe(model=ModelSection(preset="lite-swin-s-cityscapes", config=config))
    found = create_config(recipe, CATEGORIES)
    assert (found.encoder, found.num_queries, found.num_labels) == ("lite", 9, 3)
    assert found.backbone_config.depths == [1, 1, 1, 1] and found.backbone_config.drop_path_rate == 0.3


def test_new_weights_depend_on_the_seed_alone():
    recipe = tiny_recipe()
    first, _ = load_model_and_processor(recipe, CATEGORIES)
    torch.rand(5)
    second, _ = load_model_and_processor(recipe, CATEGORIES)
    recipe.seed = 1
    third, _ = load_model_and_processor(recipe, CATEGORIES)
    assert torch.equal(first.class_predictor.weight, second.class_predictor.weight)
    assert not torch.equal(first.class_predictor.weight, third.class_predictor.weight)


def test_a_pretrained_model_keeps_all_but_its_classes(caplog):
    recipe = Recipe(model=ModelSection(pretrained=DEMO_MODEL, config={"train_num_points": 99}))
    with caplog.at_level(logging.WARNING):
        model, processor = load_model_and_processor(recipe, CATEGORIES)
    original = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(DEMO_MODEL)
    new = [name for name, tensor in weights_of(model).items() if not torch.equal(tensor, original.state_dict()[name])
           if tensor.shape == original.state_dict()[name].shape]  # fmt: skip
    assert new == []
    assert model.class_predictor.out_features == 4
    assert model.config.train_num_points == 99 and model.config.num_queries == original.config.num_queries
    assert processor.size["shortest_edge"] == 128  # the pretrained model's
    assert list(processor.label_ids_to_fuse) == [1]
    [line] = [record.getMessage() for record in caplog.records if "New, since" in record.getMessage()]
    assert "class_predictor" in line and "\n" not in line


def test_batch_norms_that_are_trained_are_synchronized_between_gpus(monkeypatch):
    config = {"backbone_config": {"model_type": "resnet", **TINY_RESNET}}
    frozen, recipe = tiny_recipe(), tiny_recipe()
    for each in (frozen, recipe):
        each.model.config |= config
        each.optimization.sync_batch_norm = True
    recipe.model.config["freeze_backbone_batch_norm"] = False

    def norms(recipe):
        model, _ = load_model_and_processor(recipe, CATEGORIES)
        return {type(m) for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}, model

    alone, model = norms(recipe)
    assert alone == {torch.nn.BatchNorm2d}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    assert norms(recipe)[0] == {torch.nn.BatchNorm2d}
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    assert norms(frozen)[0] == {torch.nn.BatchNorm2d}
    together, other = norms(recipe)
    assert together == {torch.nn.SyncBatchNorm}
    pixel_values = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = model.eval()(pixel_values), other.eval()(pixel_values)
    assert torch.equal(found.masks_queries_logits, expected.masks_queries_logits)
    assert weights_of(model).keys() == weights_of(other).keys()
    recipe.optimization.sync_batch_norm = False
    assert norms(recipe)[0] == {torch.nn.BatchNorm2d}


def test_nothing_is_new_for_the_same_classes(caplog):
    names = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(DEMO_MODEL).config.id2label
    categories = [{"id": label, "name": name, "isthing": int(label < 10)} for label, name in names.items()]
    with caplog.at_level(logging.WARNING):
        load_model_and_processor(Recipe(model=ModelSection(pretrained=DEMO_MODEL)), categories)
    assert not [record for record in caplog.records if "New, since" in record.getMessage()]


def test_a_checkpoint_of_16_bits_is_trained_in_32(tmp_path):
    ProScaleMask2FormerForUniversalSegmentation(tiny_config()).to(torch.bfloat16).save_pretrained(tmp_path)
    create_image_processor(Recipe(), CATEGORIES).save_pretrained(tmp_path)
    recipe = Recipe(model=ModelSection(pretrained=str(tmp_path)))
    assert load_model_and_processor(recipe, CATEGORIES)[0].dtype == torch.float32


def test_the_licence_stays_with_the_weights(tmp_path):
    ProScaleMask2FormerForUniversalSegmentation(tiny_config(weights_license="no redistribution")).save_pretrained(
        tmp_path
    )
    create_image_processor(Recipe(), CATEGORIES).save_pretrained(tmp_path)
    model, _ = load_model_and_processor(Recipe(model=ModelSection(pretrained=str(tmp_path))), CATEGORIES)
    assert model.config.weights_license == "no redistribution"


@pytest.mark.parametrize("architecture", ["swin", "resnet", "proscale"])
def test_backbone_weights_come_from_a_folder(tmp_path, architecture):
    torch.manual_seed(5)
    if architecture == "swin":
        backbone_config = TINY_SWIN
        donor = SwinForImageClassification(SwinConfig(**{**TINY_SWIN, "out_features": None}))
        example = "encoder.layers.0.blocks.0.attention.relative_position_bias"
    elif architecture == "resnet":
        backbone_config = TINY_RESNET
        donor = ResNetForImageClassification(ResNetConfig(**{**TINY_RESNET, "out_features": None}))
        example = "embedder.embedder.convolution.weight"
    else:
        backbone_config = TINY_RESNET
        donor = ProScaleMask2FormerForUniversalSegmentation(tiny_config(backbone_config=dict(TINY_RESNET)))
        example = "embedder.embedder.convolution.weight"
    donor.save_pretrained(tmp_path)
    recipe = tiny_recipe(backbone=str(tmp_path))
    recipe.model.config["backbone_config"] = dict(backbone_config)
    model, _ = load_model_and_processor(recipe, CATEGORIES)
    [expected] = [tensor for name, tensor in donor.state_dict().items() if example in name][:1]
    filled = weights_of(model, "model.pixel_level_module.encoder.")
    [found] = [tensor for name, tensor in filled.items() if example in name][:1]
    assert torch.equal(found, expected)
    same = sum(
        any(tensor.shape == other.shape and torch.equal(tensor, other) for other in donor.state_dict().values())
        for tensor in filled.values()
    )
    assert same == len(filled)  # also what was not in the donor: norms are 1 and 0 in both


def test_backbone_weights_come_from_timm(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(5)
    donor = timm.create_model("resnet10t", pretrained=False)
    timm.models.save_for_hf(donor, tmp_path, model_config={"architecture": "resnet10t"}, safe_serialization=True)
    recipe = tiny_recipe(backbone=str(tmp_path))
    recipe.model.config["backbone_config"] = {
        "model_type": "timm_backbone",
        "backbone": "resnet10t",
        "use_pretrained_backbone": False,
        "out_indices": [1, 2, 3, 4],
    }
    model, _ = load_model_and_processor(recipe, CATEGORIES)
    found = model.model.pixel_level_module.encoder.state_dict()["_backbone.layer1.0.conv1.weight"]
    assert torch.equal(found, donor.state_dict()["layer1.0.conv1.weight"])


def test_weights_of_another_architecture_are_refused(tmp_path):
    SwinForImageClassification(SwinConfig(**{**TINY_SWIN, "embed_dim": 16, "out_features": None})).save_pretrained(
        tmp_path
    )
    with pytest.raises(RecipeError, match="must describe the same architecture") as error:
        load_model_and_processor(tiny_recipe(backbone=str(tmp_path)), CATEGORIES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("section", [{"pretrained": "no/where/at/all"}, {"backbone": "no/where/at/all"}])
def test_weights_that_are_not_there(section):
    with pytest.raises(RecipeError, match="no/where/at/all") as error:
        load_model_and_processor(tiny_recipe(**section), CATEGORIES)
    assert "\n" not in str(error.value)


def test_damaged_weights_and_pickles_are_refused(tmp_path):
    ProScaleMask2FormerForUniversalSegmentation(tiny_config()).save_pretrained(tmp_path)
    create_image_processor(Recipe(), CATEGORIES).save_pretrained(tmp_path)
    recipe = Recipe(model=ModelSection(pretrained=str(tmp_path)))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RecipeError, match="cannot load"):
        load_model_and_processor(recipe, CATEGORIES)
    weights.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RecipeError, match="cannot load"):
        load_model_and_processor(recipe, CATEGORIES)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(model=ModelSection(config={"num_queries": 0})), "model.config: .*num_queries"),
        (Recipe(model=ModelSection(config={"encoder": "none"})), "model.config: .*encoder"),
        (Recipe(image_processor={"sise": {}}), "image_processor.sise; did you mean size"),
    ],
)
def test_fields_that_are_not_possible(recipe, message):
    with pytest.raises(RecipeError, match=message) as error:
        load_model_and_processor(recipe, CATEGORIES)
    assert "\n" not in str(error.value)


def write_coco(folder: Path, names=("cat", "dog")) -> dict:
    """Two images with one object each, in COCO's instance format; the options of the data set."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(2):
        Image.fromarray(np.full((40, 50, 3), 40 * image_id, np.uint8)).save(folder / "images" / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": 40, "width": 50})
        polygon = [5, 5, 25, 5, 25, 25, 5, 25]
        annotations.append(
            {"id": image_id + 1, "image_id": image_id, "category_id": image_id, "segmentation": [polygon],
             "area": 400, "bbox": [5, 5, 20, 20], "iscrowd": 0}
        )  # fmt: skip
    categories = [{"id": label, "name": name} for label, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return {"name": "coco_instance", "images": str(folder / "images"), "annotations": str(folder / "instances.json")}


def test_data_sets_of_a_recipe(tmp_path):
    recipe = Recipe(augmentation={"name": "resize", "short_edge": 64, "longest_edge": 80, "flip": 0.0})
    recipe.data.train = recipe.data.validation = write_coco(tmp_path)
    train, validation = load_datasets(recipe)
    assert (len(train), len(validation)) == (2, 2)
    example = training_set(recipe, train, create_image_processor(recipe, train.categories))[1]
    assert set(example) == {"pixel_values", "packed_masks", "class_labels"}
    assert example["pixel_values"].shape == (3, 64, 80) and example["class_labels"].tolist() == [1]
    recipe.data.validation = None
    assert load_datasets(recipe)[1] is None


def test_data_sets_that_do_not_belong_together(tmp_path):
    recipe = Recipe()
    with pytest.raises(RecipeError, match="what to train on"):
        load_datasets(recipe)
    recipe.data.train = write_coco(tmp_path / "a")
    recipe.data.validation = write_coco(tmp_path / "b", names=("cat", "wolf"))
    with pytest.raises(RecipeError, match=r"label 1 is 'dog' in data.train and 'wolf' in data.validation"):
        load_datasets(recipe)
    recipe.data.validation = write_coco(tmp_path / "c", names=("cat", "dog", "wolf"))
    with pytest.raises(RecipeError, match=r"2 categories and data.validation 3"):
        load_datasets(recipe)
    recipe.data.validation = recipe.data.train
    recipe.evaluation.tasks = ("panoptic",)
    with pytest.raises(ValueError, match="cannot measure panoptic"):
        load_datasets(recipe)


def test_training_on_nothing_is_refused(tmp_path):
    recipe = Recipe()
    recipe.data.train = write_coco(tmp_path)
    path = Path(recipe.data.train["annotations"])
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "annotations": [{**a, "iscrowd": 1} for a in content["annotations"]]}))
    with pytest.raises(ValueError, match="nothing to train on"):
        load_datasets(recipe)


def test_a_recipe_file_reaches_the_data_set(tmp_path):
    options = write_coco(tmp_path)
    (tmp_path / "recipe.yaml").write_text(f"data: {{train: {{name: coco_instance, images: {options['images']}}}}}")
    recipe = load_recipe(tmp_path / "recipe.yaml", [f"data.train.annotations={options['annotations']}"])
    assert len(load_datasets(recipe)[0]) == 2
