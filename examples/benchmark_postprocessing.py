"""Measure the time of panoptic post-processing, here and with a loop over the queries as in Mask2Former's code.

    python examples/benchmark_postprocessing.py --threads 2

The results of both are the same.
"""

import argparse
import statistics
import time
from collections.abc import Callable

from proscale_hf.endings import end_well


if __name__ == "__main__":
    end_well()  # before the imports that take seconds

import torch
from torch import Tensor
from torch.nn import functional

from proscale_hf.processing.postprocessing import panoptic_segmentation


LABELS, QUERIES = 133, 100
STUFF = range(80, LABELS)
PADDED_SIZE, SIZE = (800, 1344), (800, 1333)


def made_up_outputs(kept: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Class logits with `kept` sure queries, and masks that divide the image, so that most of them become segments."""
    labels = torch.full((QUERIES,), LABELS)
    labels[:kept] = torch.arange(kept) % LABELS
    classes = functional.one_hot(labels, LABELS + 1)[None] * 20.0
    centres = torch.rand((QUERIES, 2, 1, 1), generator=generator)
    rows, columns = torch.linspace(0, 1, 200)[:, None], torch.linspace(0, 1, 336)
    distances = (rows - centres[:, 0]).square() + (columns - centres[:, 1]).square()  # (queries, 200, 336)
    distances[kept:] = torch.inf
    margin = distances.topk(2, dim=0, largest=False).values.sum(0) / 2
    return classes, (400 * (margin - distances)).clamp(-10, 10)[None]


def loop_over_queries(classes: Tensor, masks: Tensor) -> Tensor:
    """Panoptic segmentation that goes over the pixels once for each query."""
    masks = functional.interpolate(masks, size=PADDED_SIZE, mode="bilinear", align_corners=False)
    masks = masks[..., : SIZE[0], : SIZE[1]]
    masks = functional.interpolate(masks, size=SIZE, mode="bilinear", align_corners=False)[0].sigmoid()
    scores, labels = classes[0].softmax(-1).max(-1)
    kept = (labels != LABELS) & (scores > 0.8)
    scores, labels, masks = scores[kept], labels[kept].tolist(), masks[kept]
    winner = (scores[:, None, None] * masks).argmax(0)
    segmentation, fused, last = torch.zeros(SIZE, dtype=torch.int32), {}, 0
    for query, label in enumerate(labels):
        won, inside = winner == query, masks[query] >= 0.5
        segment = won & inside
        if not segment.any() or won.sum() / inside.sum() < 0.8:
            continue
        if label in fused:
            segmentation[segment] = fused[label]
            continue
        last += 1
        segmentation[segment] = last
        if label in STUFF:
            fused[label] = last
    return segmentation


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """The median time of `repeats` calls, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| kept queries | segments | loop, s | here, s | ratio |\n| --- | --- | --- | --- | --- |")
    for kept in (12, 100):
        classes, masks = made_up_outputs(kept, torch.Generator().manual_seed(0))
        sizes = {"padded_size": PADDED_SIZE, "image_sizes": [SIZE], "target_sizes": [SIZE]}

        def ours(classes: Tensor = classes, masks: Tensor = masks, sizes: dict = sizes) -> Tensor:
            return panoptic_segmentation(classes, masks, **sizes, label_ids_to_fuse=STUFF)[0]["segmentation"]

        def theirs(classes: Tensor = classes, masks: Tensor = masks) -> Tensor:
            return loop_over_queries(classes, masks)

        with torch.inference_mode():
            expected = theirs()
            if not (ours() == expected).float().mean() > 0.999:
                raise SystemExit("error: the results of the loop and of this package differ")
            loop, here = median_seconds(theirs, options.repeats), median_seconds(ours, options.repeats)
        print(f"| {kept} | {expected.max()} | {loop:.3f} | {here:.3f} | {loop / here:.1f} |")


if __name__ == "__main__":
    main()
