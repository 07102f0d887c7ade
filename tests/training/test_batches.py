"""The order of training images."""

import pytest
import torch


pytest.importorskip("yaml")
pytest.importorskip("datasets")

from proscale_hf.training.batches import training_batches
from proscale_hf.training.recipe import OptimizationSection, Recipe


class Numbers(torch.utils.data.Dataset):
    """Says which index and epoch it was asked for, in the form of a training example."""

    epoch = 0

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return self.number

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        labels = torch.tensor([self.epoch, index])
        planes = torch.zeros(1, 32, 32, dtype=torch.uint8)
        return {"pixel_values": torch.zeros(3, 32, 32), "packed_masks": planes, "class_labels": labels}


def order_of(steps, first_step=0, device_batch_size=4, rank=0, processes=1, seed=0, images=11):
    recipe = Recipe(optimization=OptimizationSection(batch_size=4), seed=seed, workers=0)
    batches = training_batches(Numbers(images), recipe, device_batch_size, first_step, rank, processes)
    passes = 4 // (device_batch_size * processes)
    return [
        [tuple(labels.tolist()) for _ in range(passes) for labels in next(batches)["class_labels"]]
        for _ in range(steps)
    ]


def test_each_epoch_is_shuffled_anew_and_has_each_image_once():
    order = order_of(6)
    epochs = [[epoch for epoch, _ in batch] for batch in order]
    assert epochs == [[0] * 4] * 2 + [[1] * 4] * 2 + [[2] * 4] * 2
    indices = [[index for batch in order[start : start + 2] for _, index in batch] for start in (0, 2, 4)]
    assert all(len(set(part)) == 8 for part in indices)
    assert indices[0] != indices[1] != indices[2]
    assert order_of(6, seed=1) != order and order_of(6) == order


def test_the_order_can_be_entered_anywhere():
    order = order_of(6)
    for first_step in range(5):
        assert order_of(6 - first_step, first_step) == order[first_step:]


def test_the_images_of_an_update_do_not_depend_on_how_they_are_divided():
    joint = [set(batch) for batch in order_of(6)]
    assert [set(batch) for batch in order_of(6, device_batch_size=1)] == joint
    parts = [order_of(6, device_batch_size=2, rank=rank, processes=2) for rank in (0, 1)]
    assert [set(first) | set(second) for first, second in zip(*parts, strict=True)] == joint


def test_the_order_takes_nothing_from_the_global_random_numbers():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    order_of(6)
    assert torch.equal(torch.get_rng_state(), state)
