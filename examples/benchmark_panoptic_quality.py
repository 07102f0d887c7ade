"""Measure the time that panoptic quality of COCO-panoptic files takes here and in panopticapi, the reference.

    python examples/benchmark_panoptic_quality.py --images 1000 --panopticapi FOLDER

makes a set of images of 480 x 640 pixels with about 15 segments each, evaluates it with both in turns, and prints the
times and the largest difference of the numbers. FOLDER is a checkout of github.com/cocodataset/panopticapi; without it
the installed package is taken. The time of the whole command includes the start of Python and all imports. Processor
time is that of all processes together; it does not depend on other work of the machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from proscale_hf.endings import end_well


if __name__ == "__main__":
    end_well()  # before the imports that take seconds

import numpy as np
from PIL import Image


HEIGHT, WIDTH, SEGMENTS, CATEGORIES = 480, 640, 15, 133
SET = ("gt.json", "gt", "pred.json", "pred")
OURS = """
import json, os, sys, time
from pathlib import Path
from proscale_hf.evaluation.panoptic_files import panoptic_quality_of_files
*paths, processes = sys.argv[1:]
start, before = time.perf_counter(), sum(os.times()[:4])
result = panoptic_quality_of_files(*map(Path, paths), int(processes))
seconds = time.perf_counter() - start
processor_seconds = sum(os.times()[:4]) - before
print(json.dumps({"evaluation": seconds, "processor time": processor_seconds, "result": result}))
"""
REFERENCE = """
import json, multiprocessing, os, sys, time
from panopticapi.evaluation import pq_compute
truth, truth_folder, prediction, prediction_folder, processes = sys.argv[1:]
multiprocessing.cpu_count = lambda: int(processes)  # it starts one process per core
start, before = time.perf_counter(), sum(os.times()[:4])
result = pq_compute(truth, prediction, truth_folder, prediction_folder)
seconds = time.perf_counter() - start
for child in multiprocessing.active_children():  # which it leaves behind; only the time of ended processes is known
    child.terminate()
    child.join()
processor_seconds = sum(os.times()[:4]) - before
print(json.dumps({"evaluation": seconds, "processor time": processor_seconds, "result": result}))
"""


def draw_scene(generator: np.random.Generator) -> np.ndarray:
    """A (height, width) map of ids: a background and shapes with wavy outlines."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    ids = generator.choice(256**3 - 1, SEGMENTS, replace=False) + 1
    scene = np.full((HEIGHT, WIDTH), ids[0])
    for segment_id in ids[1:]:
        center_row, center_column = generator.integers((HEIGHT, WIDTH))
        radii = generator.integers(20, 200, 2)
        waves = 5 * np.sin(columns / generator.integers(3, 20))
        scene[((rows - center_row + waves) / radii[0]) ** 2 + ((columns - center_column) / radii[1]) ** 2 < 1] = (
            segment_id
        )
    return scene


def write_set(folder: Path, images: int) -> None:
    """A ground truth, and a prediction that is a little beside it and leaves a part void."""
    generator = np.random.default_rng(0)
    truths, predictions = [], []
    for name in SET[1::2]:
        (folder / name).mkdir()
    for image_id in range(images):
        truth = draw_scene(generator)
        prediction = np.roll(truth, generator.integers(-9, 10, 2), (0, 1))
        prediction[generator.integers(400) :][:50] = 0
        category_of = {segment_id: int(generator.integers(CATEGORIES)) + 1 for segment_id in np.unique(truth).tolist()}
        for annotations, segment_map, name in ((truths, truth, "gt"), (predictions, prediction, "pred")):
            colors = segment_map.astype("<u4")[..., None].view(np.uint8)[..., :3]
            Image.fromarray(colors).save(folder / name / f"{image_id}.png")
            ids, areas = np.unique(segment_map[segment_map > 0], return_counts=True)
            segments = [
                {"id": segment_id, "category_id": category_of[segment_id], "area": area, "iscrowd": 0}
                for segment_id, area in zip(ids.tolist(), areas.tolist(), strict=True)
            ]
            annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments})
    categories = [
        {"id": number, "name": str(number), "isthing": int(number < 81)} for number in range(1, CATEGORIES + 1)
    ]
    (folder / "gt.json").write_text(json.dumps({"annotations": truths, "categories": categories}))
    (folder / "pred.json").write_text(json.dumps({"annotations": predictions}))


def run(code: str, folder: Path, processes: int, python_path: Path | None) -> dict[str, Any]:
    """The output of a fresh Python, and under "whole command" the seconds of the whole command."""
    paths = [str(path) for path in (python_path, Path(__file__).parents[1]) if path is not None]
    command = [sys.executable, "-c", code, *(str(folder / name) for name in SET), str(processes)]
    start = time.perf_counter()
    finished = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    )
    if finished.returncode:
        sys.exit(f"error: {finished.stderr.strip().splitlines()[-1]}")
    return {**json.loads(finished.stdout.splitlines()[-1]), "whole command": time.perf_counter() - start}


def largest_difference(first: Any, second: Any) -> float:
    if isinstance(second, dict):
        return max(largest_difference(first[key], value) for key, value in second.items())
    return abs(first - second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of either (default: one per core)")
    parser.add_argument("--panopticapi", type=Path, help="folder that has the package panopticapi")
    options = parser.parse_args()
    check = [sys.executable, "-c", "import panopticapi.evaluation"]
    environment = {**os.environ, "PYTHONPATH": str(options.panopticapi or "")}
    if subprocess.run(check, capture_output=True, env=environment).returncode:
        sys.exit(
            "error: panopticapi is not here; clone github.com/cocodataset/panopticapi and give --panopticapi FOLDER"
        )
    runs = []
    with tempfile.TemporaryDirectory() as name:
        write_set(Path(name), options.images)
        for _ in range(options.repeats):
            reference = run(REFERENCE, Path(name), options.processes, options.panopticapi)
            ours = run(OURS, Path(name), options.processes, None)
            runs.append((ours, reference))
    print(f"{options.images} images, {options.processes} processes, medians of {options.repeats} runs in turns\n")
    print("| | proscale_hf | panopticapi | times faster (of each run) |\n| --- | --- | --- | --- |")
    for kind in ("evaluation", "processor time", "whole command"):
        medians = [statistics.median(side[kind] for side in sides) for sides in zip(*runs, strict=True)]
        ratios = [reference[kind] / ours[kind] for ours, reference in runs]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {kind} | {medians[0]:.2f} s | {medians[1]:.2f} s | {statistics.median(ratios):.2f} ({each}) |")
    print(f"\nlargest difference of a number: {largest_difference(ours['result'], reference['result']):.1e}")


if __name__ == "__main__":
    main()
