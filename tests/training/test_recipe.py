"""Recipes: defaults, merging, overrides, and the files that are shipped."""

import json

import pytest
import torch
from transformers import ResNetConfig, SwinConfig

from paths import ROOT
from proscale_hf import ProScaleMask2FormerConfig, ProScaleMask2FormerForUniversalSegmentation
from proscale_hf.data.categories import load_categories
from proscale_hf.models.mask2former.presets import preset_settings


pytest.importorskip("datasets")

from proscale_hf.training.recipe import Recipe, RecipeError, load_recipe


CONFIGS = ROOT / "examples" / "configs"
DEMO_MODEL = str(ROOT / "proscale_hf" / "demo_model")


def recipe_of(folder, text, *overrides, name="recipe.yaml"):
    (folder / name).write_text(text)
    return load_recipe(folder / name, overrides)


def test_the_defaults_are_the_papers(tmp_path):
    recipe = recipe_of(tmp_path, "")
    optimization = recipe.optimization
    assert (optimization.learning_rate, optimization.weight_decay, optimization.batch_size) == (1e-4, 0.05, 16)
    assert (optimization.backbone_factor, optimization.clip) == (0.1, 0.01)
    assert (optimization.schedule, optimization.decay_at, optimization.decay_factor) == ("steps", (0.9, 0.95), 0.1)
    assert optimization.ema is None
    assert recipe.augmentation == {
        "name": "large_scale_jitter",
        "scale": [0.1, 2.0],
        "size": [1024, 1024],
        "flip": 0.5,
        "pad": True,
    }


def test_a_base_is_merged_key_by_key_and_lists_are_replaced(tmp_path):
    recipe_of(tmp_path, "optimization: {max_steps: 10, decay_at: [0.5, 0.6]}\nseed: 3", name="base.yaml")
    recipe = recipe_of(tmp_path, "base: base.yaml\noptimization: {decay_at: [0.7]}")
    assert (recipe.optimization.max_steps, recipe.optimization.decay_at, recipe.seed) == (10, (0.7,), 3)


def test_another_name_replaces_what_belonged_to_the_old_one(tmp_path):
    recipe_of(tmp_path, "data: {train: {name: coco_panoptic, root: a, split: b}}", name="base.yaml")
    same = recipe_of(tmp_path, "base: base.yaml\ndata: {train: {root: c}}")
    assert same.data.train == {"name": "coco_panoptic", "root": "c", "split": "b"}
    other = recipe_of(tmp_path, "base: base.yaml", "data.train.root=d", "data.train.name=folder")
    assert other.data.train == {"root": "d", "name": "folder"}
    assert recipe_of(tmp_path, "augmentation: {flip: 0}").augmentation["size"] == [1024, 1024]
    assert recipe_of(tmp_path, "augmentation: {name: resize}").augmentation == {"name": "resize"}


def test_numbers_and_words_that_yaml_reads_differently(tmp_path):
    recipe = recipe_of(
        tmp_path,
        "optimization: {learning_rate: 1e-4, weight_decay: 5E-2, max_steps: 1e3, precision: no, clip: 1}",
        "optimization.backbone_factor=1e-1",
        "model.config.dropout=1e-1",
    )
    optimization = recipe.optimization
    assert (optimization.learning_rate, optimization.weight_decay, optimization.max_steps) == (1e-4, 0.05, 1000)
    assert (optimization.precision, optimization.clip, optimization.backbone_factor) == ("no", 1.0, 0.1)
    assert recipe.model.config == {"dropout": 0.1}
    assert isinstance(optimization.max_steps, int)


def test_what_is_written_is_read_again(tmp_path):
    recipe = recipe_of(tmp_path, "optimization: {epochs: 1.5, precision: no}\nevaluation: {tasks: [semantic]}")
    assert recipe_of(tmp_path, recipe.to_yaml(), name="again.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimization.learning_rat=1", r"unknown key optimization.learning_rat; did you mean learning_rate\?"),
        ("optimisation.clip=1", r"unknown key optimisation; did you mean optimization\?"),
        ("model.config.num_querys=1", r"unknown key model.config.num_querys; did you mean num_queries\?"),
        ("model.config.categories=[]", "unknown key model.config.categories"),
        ("optimization.learning_rate=fast", "optimization.learning_rate must be a number, got 'fast'"),
        ("optimization.learning_rate=-1", "optimization.learning_rate must be greater than 0"),
        ("optimization.learning_rate=.nan", "optimization.learning_rate must be a number"),
        ("optimization.learning_rate=.inf", "optimization.learning_rate must be a number"),
        ("optimization.batch_size=.inf", "optimization.batch_size must be a whole number"),
        ("seed=2000-99-99", "the value is no valid YAML: month must be in"),
        ("seed=!!bool x", "the value is no valid YAML"),
        ("optimization.batch_size=1.5", "optimization.batch_size must be a whole number"),
        ("optimization.batch_size=true", "optimization.batch_size must be a whole number"),
        ("optimization.sync_batch_norm=1", "optimization.sync_batch_norm must be true or false, got 1"),
        ("optimization.batch_size=null", "optimization.batch_size must be a whole number"),
        ("optimization.decay_at=[0.9, 0.5]", "decay_at must be growing shares"),
        ("optimization.decay_at=0.9", "decay_at must be a list"),
        ("optimization.precision=fp8", "precision must be one of no, fp16, bf16"),
        ("optimization.ema=1", "ema must be from 0 up to below 1"),
        ("optimization.epochs=3", "either optimization.max_steps or optimization.epochs"),
        ("evaluation.tasks=[panoptik]", "evaluation.tasks must be a list of panoptic, instance, semantic"),
        ("data.train.root=x", "data.train needs the name of a kind of data set"),
        ("data.on_error=stop", "data.on_error must be one of raise, skip"),
        ("model=3", "model must be a section"),
        ("seed", "must be section.key=value"),
        ("=3", "must be section.key=value"),
        ("seed=[", "the value is no valid YAML"),
        ("model.backbone=x", "either model.pretrained, which has a backbone, or model.backbone"),
        ("model.preset=proscale-swin-t-coco", "either model.pretrained, which has a configuration, or model.preset"),
        (
            "model={pretrained: null, preset: proscale-swin-t-coc}",
            "model.preset: There is no preset .* proscale-swin-t-coco,",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(tmp_path, override, message):
    text = "optimization: {max_steps: 5}\nmodel: {pretrained: x}"
    with pytest.raises(RecipeError, match=message) as error:
        recipe_of(tmp_path, text, override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", "'seed' occurs twice"),
        ("- 1", "must hold sections"),
        ("seed: {", "no valid YAML"),
        ("base: recipe.yaml", "is based on itself"),
        (r'base: "a\0b"', r"a\\x00b is no possible path"),
        ("base: nowhere.yaml", "there is no recipe .*nowhere.yaml"),
        ("seed: !!python/object/apply:os.getcwd []", "no valid YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message) as error:
        recipe_of(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "categories", "steps"),
    [
        ("coco_swin_t", "coco_panoptic", 368_750),
        ("coco_r50", "coco_panoptic", 368_750),
        ("coco_mvitv2_t", "coco_panoptic", 368_750),
        ("cityscapes_swin_t", "cityscapes", 90_000),
        ("cityscapes_swin_s", "cityscapes", 90_000),
        ("cityscapes_swin_b", "cityscapes", 90_000),
        ("cityscapes_swin_l", "cityscapes", 90_000),
        ("cityscapes_r50", "cityscapes", 90_000),
        ("cityscapes_r101", "cityscapes", 90_000),
        ("ade20k_swin_t", "ade20k_panoptic", 160_000),
        ("finetune", "coco_instance", 5000),
        ("demo_scenes", "coco_panoptic", 10_000),
    ],
)
def test_shipped_recipes_make_models(name, categories, steps):
    setup = pytest.importorskip("proscale_hf.training.setup", exc_type=ImportError)
    if "mvitv2" in name:
        pytest.importorskip("timm")
    overrides = [f"model.pretrained={DEMO_MODEL}"] if name == "finetune" else []
    recipe = load_recipe(CONFIGS / f"{name}.yaml", overrides)
    assert recipe.optimization.max_steps == steps
    config = setup.create_config(recipe, load_categories(categories))
    if recipe.model.preset is not None:
        names = {label: category["name"] for label, category in enumerate(load_categories(categories))}
        labels = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
        preset = ProScaleMask2FormerConfig.from_preset(recipe.model.preset)
        assert config.to_dict() == {**preset.to_dict(), **labels, "categories": load_categories(categories)}
    with torch.device("meta"):
        model = ProScaleMask2FormerForUniversalSegmentation(config)
    assert model.class_predictor.out_features == len(load_categories(categories)) + 1
    assert model.model.pixel_level_module.freeze_batch_norm == (
        name not in ("cityscapes_r50", "cityscapes_r101", "demo_scenes", "finetune")
    )
    processor = setup.create_image_processor(recipe, load_categories(categories))
    stuff = [label for label, category in enumerate(load_categories(categories)) if not category["isthing"]]
    assert list(processor.label_ids_to_fuse) == stuff


def recipes_with_presets() -> list[Recipe]:
    recipes = [load_recipe(path) for path in sorted(CONFIGS.glob("*.yaml"))]
    return [recipe for recipe in recipes if recipe.model.preset is not None]


@pytest.mark.parametrize("recipe", recipes_with_presets(), ids=lambda recipe: recipe.model.preset)
def test_the_weights_of_a_backbone_have_its_architecture(recipe):
    """What the models' own configurations on the Hub say."""
    if recipe.model.backbone == "timm/mvitv2_tiny.fb_in1k":
        assert preset_settings(recipe.model.preset)["backbone_config"]["backbone"] == "mvitv2_tiny"
        return
    deep = [2, 2, 18, 2]
    published = {
        "microsoft/resnet-50": ResNetConfig(depths=[3, 4, 6, 3]),
        "microsoft/resnet-101": ResNetConfig(depths=[3, 4, 23, 3]),
        "microsoft/swin-tiny-patch4-window7-224": SwinConfig(),
        "microsoft/swin-small-patch4-window7-224": SwinConfig(depths=deep),
        "microsoft/swin-base-patch4-window12-384-in22k": SwinConfig(
            image_size=384, window_size=12, embed_dim=128, depths=deep, num_heads=[4, 8, 16, 32]
        ),
        "microsoft/swin-large-patch4-window12-384-in22k": SwinConfig(
            image_size=384, window_size=12, embed_dim=192, depths=deep, num_heads=[6, 12, 24, 48]
        ),
    }[recipe.model.backbone].to_dict()
    backbone = ProScaleMask2FormerConfig.from_preset(recipe.model.preset).backbone_config.to_dict()
    different = {key for key in published if published[key] != backbone[key]}
    assert different <= {"out_features", "out_indices", "_out_features", "_out_indices", "drop_path_rate"}


def test_every_model_of_the_papers_tables_has_a_recipe():
    """With the recipe for its data and backbone, whose `model.preset` becomes that model's."""

    def data_and_backbone(preset: str, data: str) -> tuple[str, str]:
        backbone = preset_settings(preset)["backbone_config"]
        return data, str({key: backbone[key] for key in backbone if not key.startswith("out_")})

    recipes = {
        data_and_backbone(recipe.model.preset, recipe.data.train["name"].removesuffix("_panoptic"))
        for recipe in recipes_with_presets()
    }
    tables = json.loads((ROOT / "proscale_hf" / "paper" / "tables.json").read_text())["tables"]
    rows = [row for table in tables for row in table["rows"] if "preset" in row]
    assert {data_and_backbone(row["preset"], row["dataset"]) for row in rows} <= recipes


def test_shipped_recipes_hold_deltas_only():
    for path in CONFIGS.glob("*.yaml"):
        values = load_recipe(path)
        for override in ("optimization.weight_decay=0.05", "seed=0"):
            assert load_recipe(path, [override]) == values
        assert "weight_decay" not in path.read_text(), path


def test_augmentations_of_shipped_recipes_can_be_built():
    augmentation = pytest.importorskip("proscale_hf.data.augmentation", exc_type=ImportError)
    for path in CONFIGS.glob("*.yaml"):
        augmentation.build_augmentation(load_recipe(path).augmentation)
