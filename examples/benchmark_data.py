"""Measure how fast one data worker is: samples of 640 x 480 with 20 segments, in each kind of augmentation.

    OMP_NUM_THREADS=1 python examples/benchmark_data.py

The decoding of the image file is measured separately. Photographs come from scikit-image.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable

from proscale_hf.endings import end_well


if __name__ == "__main__":
    end_well()  # before the imports that take seconds

import numpy as np
import torch
from PIL import Image
from skimage import data as photographs
from skimage.segmentation import slic

from proscale_hf import ProScaleMask2FormerImageProcessor
from proscale_hf.data.augmentation import build_augmentation
from proscale_hf.data.collate import TrainingTransform, TransformedDataset
from proscale_hf.data.sample import Sample


RECIPES = {
    "COCO": {"name": "large_scale_jitter"},
    "Cityscapes": {"name": "short_edge_crop"},
    "ADE20K": {
        "name": "short_edge_crop",
        "short_edge": [int(0.1 * tenths * 640) for tenths in range(5, 21)],
        "longest_edge": 2560,
        "crop": [640, 640],
    },
    "fine-tuning": {"name": "resize"},
}
NAMES = ("astronaut", "coffee", "chelsea", "rocket")


def photograph_sample(name: str, size: tuple[int, int], segments: int) -> Sample:
    """One of scikit-image's photographs, cut into about `segments` pieces of similar colour."""
    image = Image.fromarray(getattr(photographs, name)()).convert("RGB").resize(size)
    segment_map = slic(np.asarray(image), segments, compactness=30, start_label=1).astype(np.int32)
    infos = [{"id": int(index), "label_id": int(index) % 5, "iscrowd": 0} for index in np.unique(segment_map)]
    return Sample(image, name, name, infos, segment_map=segment_map)


def milliseconds(work: Callable[[int], object], number: int) -> tuple[float, float]:
    """Mean and median time of `work`, called with 0 to `number` - 1."""
    times = []
    for index in range(number):
        start = time.perf_counter()
        work(index)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.mean(times), statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=100, help="samples for each recipe")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--segments", type=int, default=20, help="about how many there are in each image")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    samples = [photograph_sample(name, tuple(arguments.size), arguments.segments) for name in NAMES]
    file = io.BytesIO()
    samples[0].image.save(file, "JPEG", quality=95)
    decoding, _ = milliseconds(lambda index: Image.open(file).convert("RGB"), arguments.number)
    counts = [len(sample.segments) for sample in samples]
    print(f"{arguments.size[0]} x {arguments.size[1]}, {min(counts)} to {max(counts)} segments, one thread")
    print(f"decoding a JPEG: {decoding:.1f} ms\n")
    print("| recipe | mean ms | median ms | images/s of one worker, with decoding |")
    print("| --- | --- | --- | --- |")
    for name, settings in RECIPES.items():
        transform = TrainingTransform(build_augmentation(settings), ProScaleMask2FormerImageProcessor())
        dataset = TransformedDataset([samples[index % len(samples)] for index in range(arguments.number)], transform)
        dataset[0]
        mean, median = milliseconds(dataset.__getitem__, arguments.number)
        print(f"| {name} | {mean:.1f} | {median:.1f} | {1000 / (mean + decoding):.0f} |")


if __name__ == "__main__":
    main()
