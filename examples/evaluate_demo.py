"""Measure a model's panoptic quality on demo scenes with digits and photographs it was not trained on.

python examples/evaluate_demo.py                        # the model that ships with the package, 200 scenes
python examples/evaluate_demo.py --model DIR --json
"""

import argparse
import json
import sys
from pathlib import Path

from proscale_hf.endings import end_well


if __name__ == "__main__":
    end_well()  # before the imports that take seconds

import numpy as np
import torch
from transformers import AutoModelForUniversalSegmentation

import proscale_hf
from demo_scenes import SPLITS, STUFF_LABEL_IDS, THING_LABEL_IDS, DemoScenes
from proscale_hf import ProScaleMask2FormerImageProcessorPil
from proscale_hf.evaluation.panoptic_quality import PanopticQuality
from proscale_hf.files.text import one_line
from proscale_hf.processing.segment_ids import VOID_ID


SHIPPED_MODEL = Path(proscale_hf.__file__).parent / "demo_model"
BATCH_SIZE = 10


@torch.no_grad()
def measure_panoptic_quality(model, image_processor, scenes: DemoScenes) -> dict:
    """Segment every scene and compare; the result is that of `PanopticQuality.compute`."""
    model.eval()
    measure = PanopticQuality(THING_LABEL_IDS, STUFF_LABEL_IDS)
    for start in range(0, len(scenes), BATCH_SIZE):
        batch = [scenes[index] for index in range(start, min(start + BATCH_SIZE, len(scenes)))]
        inputs = image_processor([scene.image for scene in batch], return_tensors="pt").to(model.device)
        results = image_processor.post_process_panoptic_segmentation(
            model(**inputs), target_sizes=[scene.segment_ids.shape for scene in batch]
        )
        for scene, result in zip(batch, results, strict=True):
            segments = [
                {"id": segment["id"], "category_id": segment["label_id"]} for segment in result["segments_info"]
            ]
            segment_ids = result["segmentation"].cpu().numpy()
            # Pixels of no segment are void, whatever value they carry.
            claimed = np.isin(segment_ids, [segment["id"] for segment in segments])
            measure.update(np.where(claimed, segment_ids, VOID_ID), segments, scene.segment_ids, scene.segments_info)
    return measure.compute()


def format_table(quality: dict) -> str:
    rows = [f"{'':8}{'PQ':>7}{'SQ':>7}{'RQ':>7}{'classes':>9}"]
    for group in ("All", "Things", "Stuff"):
        percents = "".join(f"{100 * quality[group][measure]:7.1f}" for measure in ("pq", "sq", "rq"))
        rows.append(f"{group:8}{percents}{quality[group]['n']:9d}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub id (default: the shipped model)")
    parser.add_argument("--number", type=int, default=200, help="how many scenes (default: 200)")
    parser.add_argument("--split", choices=SPLITS, default="held-out", help="default: held-out")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    parser.add_argument("--json", action="store_true", help="print everything, the classes too, as JSON")
    arguments = parser.parse_args()
    try:
        model = AutoModelForUniversalSegmentation.from_pretrained(arguments.model)
        image_processor = ProScaleMask2FormerImageProcessorPil.from_pretrained(arguments.model)
        scenes = DemoScenes(arguments.number, arguments.split, arguments.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot evaluate {arguments.model}: {one_line(error)}")
    quality = measure_panoptic_quality(model, image_processor, scenes)
    print(json.dumps(quality, indent=1) if arguments.json else format_table(quality))


if __name__ == "__main__":
    main()
