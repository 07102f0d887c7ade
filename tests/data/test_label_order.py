"""Labels from the data through training, model, image processor and evaluation to the files: one order, in which things
and stuff are mixed, and ids that are not in that order.
"""

import json

import pytest
import torch

from evaluation_data import CATEGORIES, options_of, write_set


pytest.importorskip("torchvision")  # augmentation needs it
pytest.importorskip("pycocotools")
from proscale_hf.data.collate import TrainingTransform, collate
from proscale_hf.data.opening import open_dataset
from proscale_hf.evaluation.coco_files import PredictionFiles, merge_parts
from proscale_hf.evaluation.evaluator import evaluate
from proscale_hf.evaluation.panoptic_files import panoptic_quality_of_files
from proscale_hf.processing.packed_masks import unpack_masks
from proscale_hf.training.recipe import Recipe
from proscale_hf.training.setup import create_config, create_image_processor


ORDERS = (["grass", "dog", "sky", "cat"], ["cat", "sky", "grass", "dog"])
UNCHANGED = {"do_resize": False, "do_normalize": False}
SURE = 20.0


def write_ordered_set(folder, names):
    """`write_set`, with the categories in the order of `names`."""
    write_set(folder, images=3)
    content = json.loads((folder / "panoptic.json").read_text())
    content["categories"] = sorted(CATEGORIES, key=lambda category: names.index(category["name"]))
    (folder / "panoptic.json").write_text(json.dumps(content))
    return open_dataset("coco_panoptic", **options_of(folder))


class Memory(torch.nn.Module):
    """In place of a trained model: has learned the training examples by heart, as the loss would have it."""

    def __init__(self, config, examples):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.config = config
        self.examples = examples

    def forward(self, pixel_values, pixel_mask, **_):
        [known] = [e for e in self.examples if torch.equal(e["pixel_values"], pixel_values)]
        [planes], [labels] = known["packed_masks"], known["class_labels"]
        masks = unpack_masks(planes, len(labels))[:, ::4, ::4] == 1  # stripes begin at multiples of 4
        class_logits = SURE * torch.nn.functional.one_hot(labels, self.config.num_labels + 1)
        return {
            "class_queries_logits": class_logits[None],
            "masks_queries_logits": torch.where(masks, SURE, -SURE)[None],
            "image_sizes": torch.tensor([pixel_mask[0].any(1).sum(), pixel_mask[0].any(0).sum()])[None],
            "padded_sizes": torch.tensor(pixel_mask.shape[1:])[None],
        }


@pytest.mark.parametrize("order_of_truth", ORDERS)
def test_what_training_teaches_is_what_evaluation_finds(tmp_path, order_of_truth):
    learned = write_ordered_set(tmp_path / "train", ORDERS[0])
    recipe = Recipe(image_processor=UNCHANGED)
    processor = create_image_processor(recipe, learned.categories)
    transform = TrainingTransform(None, processor)
    config = create_config(recipe, learned.categories)
    memory = Memory(config, [collate([transform(sample)]) for sample in learned])

    dataset = write_ordered_set(tmp_path / "val", order_of_truth)
    output = tmp_path / "out"
    output.mkdir()
    with PredictionFiles(output, dataset.categories) as files:
        results = evaluate(memory, processor, dataset, files=files)
    merge_parts(output, dataset.categories)

    # Not quite 1: at the corners where the padding begins, logits are interpolated with those of the padding.
    for group, classes in (("All", 3), ("Things", 2), ("Stuff", 1)):
        assert results["panoptic"][group] == pytest.approx({"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": classes}, abs=0.01)
    assert results["instance"]["AP"] == pytest.approx(1.0)
    assert all(
        results["semantic"]["per_class"][key] > 0.5 for key in ("3", "7", "90")
    )  # what lies on the crowd is wrong
    files = (tmp_path / "val/panoptic.json", tmp_path / "val/maps", output / "panoptic.json", output / "panoptic")
    assert panoptic_quality_of_files(*files) == results["panoptic"]
