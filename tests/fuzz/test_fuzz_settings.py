"""Configurations, recipes and settings, changed at random, are read or refused in one line, within bounds."""

import pytest
import yaml
from fuzz_tools import changed_bytes, changed_value, fuzz

from paths import ROOT
from proscale_hf import ProScaleMask2FormerImageProcessorPil
from proscale_hf.convert import ConversionError
from proscale_hf.convert.detectron2_config import dataset_of, image_processor_settings, model_settings, read_config
from proscale_hf.files.reading import reading
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig


pytestmark = pytest.mark.slow

RECIPE = (ROOT / "examples" / "configs" / "coco_swin_t.yaml").read_text()
DETECTRON2 = """
_BASE_: base.yaml
DATASETS: {TRAIN: "('coco_2017_train_panoptic',)"}
INPUT: &input {FORMAT: RGB, MIN_SIZE_TEST: 640, MAX_SIZE_TEST: 2560}
OTHER: {<<: *input, MORE: [*input, 1e-4, 2000-01-01]}
MODEL:
  META_ARCHITECTURE: MaskFormer
  PIXEL_MEAN: (51, 102.0, 153)
  PIXEL_STD: [25.5, 51, 255]
  MASK_FORMER: {TRANSFORMER_IN_FEATURE: multi_scale_pixel_decoder, NHEADS: 4, DEC_LAYERS: 10, SIZE_DIVISIBILITY: -1}
  SEM_SEG_HEAD:
    NAME: MaskFormerHead
    IN_FEATURES: [res2, res3, res4, res5]
    PIXEL_DECODER_NAME: PROSCALE
    NUM_CLASSES: 5
  BACKBONE: {NAME: D2SwinTransformer}
  SWIN: {DEPTHS: [2, 2, 6, 2], OUT_FEATURES: [res2, res3, res4, res5], DROP_PATH_RATE: 0.3}
"""
PROCESSOR = {
    "size": {"shortest_edge": 800, "longest_edge": 1333},
    "size_divisor": 32,
    "pad_size": {"height": 32, "width": 64},
    "resample": 2,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_resize": True,
    "ignore_index": 255,
    "num_labels": 4,
    "label_ids_to_fuse": [1, 3],
}


def changed_text(random, text):
    """Values of a YAML text are changed, or its lines, or its bytes."""
    match random.randrange(4):
        case 0:
            return changed_bytes(random, text.encode())
        case 1:
            lines = text.splitlines(keepends=True)
            for _ in range(random.randint(1, 3)):
                index = random.randrange(len(lines))
                more = [lines[index], f"x{index}: &a{index} [*input, *input, *input]\n", "a: &a [*a]\n", "  ", "- "]
                lines.insert(random.randrange(len(lines)), random.choice(more) * random.choice((1, 1, 500)))
            return "".join(lines).encode()
        case _:
            values = yaml.unsafe_load(text)
            for _ in range(random.randint(1, 3)):
                values = changed_value(random, values)
            return yaml.dump(values, allow_unicode=True).encode(errors="replace")


def test_changed_configurations(tmp_path):
    (tmp_path / "base.yaml").write_text("MODEL: {MASK_FORMER: {NUM_OBJECT_QUERIES: 7}}\n_BASE_: []")
    path = tmp_path / "config.yaml"

    def read(changed):
        path.write_bytes(changed)
        config = read_config(path)
        dataset_of(config)
        with reading(path, error_type=ConversionError):
            ProScaleMask2FormerImageProcessorPil(**image_processor_settings(config))
            ProScaleMask2FormerConfig(**model_settings(config))

    read(DETECTRON2.encode())
    fuzz(150, lambda random: changed_text(random, DETECTRON2), read, ConversionError)


def test_changed_recipes(tmp_path):
    recipes = pytest.importorskip("proscale_hf.training.recipe", exc_type=ImportError)
    path = tmp_path / "recipe.yaml"

    def read(changed):
        path.write_bytes(changed)
        recipes.load_recipe(path).to_yaml()

    read(RECIPE.encode())
    fuzz(150, lambda random: changed_text(random, RECIPE), read, recipes.RecipeError)


def test_changed_settings():
    def read(changed):
        ProScaleMask2FormerImageProcessorPil(**changed)

    def make(random):
        name = random.choice(list(PROCESSOR))
        return {**PROCESSOR, name: changed_value(random, PROCESSOR[name])}

    read(PROCESSOR)
    fuzz(500, make, read, ValueError)
