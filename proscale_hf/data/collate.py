"""From samples to batches for training: augment, normalise as at inference, collate.

Targets stay packed masks (`packed_masks.py`) all the way: the masks of 200 objects at 1024 x 1024 take 27 MB.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from proscale_hf.data.sample import Sample
from proscale_hf.processing.packed_masks import present_objects, select_objects


class TrainingTransform:
    """Makes a training example of a sample.

    Args:
        augmentation: what `build_augmentation` gives, or another function that takes an image, its packed masks and
            its class labels, and gives image and packed masks. None: images keep their content and size.
        image_processor: it rescales and normalises, so that training sees the values that inference sees. Its
            resizing and padding are not used.
    """

    def __init__(self, augmentation: Callable | None, image_processor: Any):
        self.augmentation = augmentation
        self.image_processor = image_processor

    def __call__(self, sample: Sample) -> dict[str, torch.Tensor]:
        """
        Returns:
            `pixel_values` (3, height, width) float32, and of the objects that still have pixels, which may be none,
            `packed_masks` (planes, height, width) uint8 and `class_labels` (objects,) int64.
        """
        image = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1)  # (3, height, width)
        planes, class_labels = sample.packed_masks()
        if self.augmentation is not None:
            image, planes = self.augmentation(image, planes, class_labels)
        present = present_objects(planes, len(class_labels))
        if not present.all():
            planes, class_labels = select_objects(planes, present), class_labels[present]
        batch = self.image_processor(
            image,
            do_resize=False,
            pad_size={"height": image.shape[1], "width": image.shape[2]},
            input_data_format="channels_first",
            return_tensors="pt",
        )
        return {"pixel_values": batch["pixel_values"][0], "packed_masks": planes, "class_labels": class_labels}


class TransformedDataset(torch.utils.data.Dataset):
    """A data set seen through a transform, whose random numbers depend on (seed, epoch, index) alone.

    So an epoch is the same with any number of workers and processes, and after resuming in the middle of it.

    Args:
        dataset: it has a length and gives a sample for an index.
        transform: it is called with a sample, and draws from torch's CPU generator.
        seed: the seed of the whole training.
    """

    def __init__(self, dataset: Sequence, transform: Callable, seed: int = 0):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # so that workers that live on see it change

    def set_epoch(self, epoch: int) -> None:
        """Choose the random numbers of an epoch. Without a call before each epoch, all are augmented alike."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        seed = np.random.SeedSequence((self.seed, int(self.epoch), index)).generate_state(1)
        with torch.random.fork_rng(devices=[]):  # nobody else's random numbers change
            torch.default_generator.manual_seed(int(seed[0]))  # torch.manual_seed would reach GPUs as well
            return self.transform(sample)


def collate(
    examples: list[dict[str, torch.Tensor]], size_divisor: int = 32, pad_size: Sequence[int] | None = None
) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """Puts examples of `TrainingTransform` together, padded with zeros at the bottom and the right.

    Args:
        examples: one or more.
        size_divisor: height and width of the batch are those of its largest images, and multiples of this.
        pad_size: (height, width) of the batch instead, so that all batches have one size.

    Returns:
        The arguments of the model's `forward`: `pixel_values` (batch, 3, height, width) float32, `pixel_mask`
        (batch, height, width) int64 with 1 for image and 0 for padding, and for each image in lists `packed_masks`
        (planes, height, width) uint8 and `class_labels` (objects,) int64.

    Raises:
        ValueError: an image is larger than `pad_size`.
    """
    sizes = [example["pixel_values"].shape[1:] for example in examples]
    largest = [max(lengths) for lengths in zip(*sizes, strict=True)]
    height, width = pad_size or (-(-length // size_divisor) * size_divisor for length in largest)
    if largest[0] > height or largest[1] > width:
        raise ValueError(f"images of up to {largest[0]} x {largest[1]} pixels do not fit pad_size {height} x {width}")

    def padded(maps: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(maps, (0, width - maps.shape[-1], 0, height - maps.shape[-2]))

    return {
        "pixel_values": torch.stack([padded(example["pixel_values"]) for example in examples]),
        "pixel_mask": torch.stack([padded(torch.ones(tuple(size), dtype=torch.int64)) for size in sizes]),
        "packed_masks": [padded(example["packed_masks"]) for example in examples],
        "class_labels": [example["class_labels"] for example in examples],
    }
