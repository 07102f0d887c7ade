"""The batches of an evaluation: dealt out to processes, read and prepared by workers, damaged files reported."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from proscale_hf.data.dataset import SegmentationDataset
from proscale_hf.data.sample import Sample, SampleError


class BatchShare:
    """Which batches one of several processes takes.

    The batches are those of a single process, dealt out in turns, so that each image is in the same batch whatever the
    number of processes. Where they do not go round, a process runs a batch that another one counts: parallel models
    need each process to run equally often.

    Args:
        images: how many there are.
        batch_size: images in a batch.
        rank: of this process.
        processes: how many there are.

    Attributes:
        batches: the positions of the images of each batch.
        is_counted: whether a batch is this process's to count.
    """

    def __init__(self, images: int, batch_size: int, rank: int = 0, processes: int = 1):
        batches = [list(range(first, min(first + batch_size, images))) for first in range(0, images, batch_size)]
        turns = range(rank, -(-len(batches) // processes) * processes, processes)
        self.batches = [batches[turn % len(batches)] for turn in turns]
        self.is_counted = [turn < len(batches) for turn in turns]


class ReadableSamples(Dataset):
    """A data set whose unreadable images are texts that say what is wrong, rather than exceptions or other images.

    An exception from a worker would carry its traceback along, and another image would count twice.
    """

    def __init__(self, dataset: SegmentationDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> Sample | str:
        try:
            return self.dataset.read(index)
        except SampleError as error:
            return str(error)


class Preparation:
    """Makes a batch of samples: `(samples, the model's inputs, errors)`. Workers do this, as it takes long.

    Where no image can be read, the inputs are an empty picture, since parallel models need each process to run.
    """

    def __init__(self, image_processor: Any):
        self.image_processor = image_processor

    def __call__(self, items: Sequence[Sample | str]) -> tuple[list[Sample], Any, list[str]]:
        samples = [item for item in items if isinstance(item, Sample)]
        errors = [item for item in items if isinstance(item, str)]
        images = [sample.image for sample in samples] or [Image.new("RGB", (128, 64))]
        return samples, self.image_processor(images=images, return_tensors="pt"), errors
