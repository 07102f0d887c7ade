"""Cost against quality (paper, figure 10): GFLOPs and PQ of models, with lines through the one to compare with.

The numbers come from files: a CSV file with the columns `name`, `gflops` and `pq` (in percent), or a JSON file with one
such object or a list of them. `results.json` of `proscale evaluate`, the files of `examples/compare_encoders.py` and
costs under `total_gflops` are understood, too. Entries of one name belong together, so PQ and GFLOPs may come from
different files, and a model may have several PQs.
"""

import csv
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from proscale_hf.files.text import one_line
from proscale_hf.paper.figures.plotting import COLORS, plot_style, shortened, to_picture


@dataclass(frozen=True)
class Result:
    """Cost and quality of one model.

    Attributes:
        name: of the model.
        gflops: of one image.
        qualities: PQ in percent, one value for each time it was measured.
    """

    name: str
    gflops: float
    qualities: tuple[float, ...]

    @property
    def quality(self) -> float:
        """The mean PQ."""
        return statistics.mean(self.qualities)

    @property
    def deviation(self) -> float:
        """The standard deviation of the PQ; 0 for a single value."""
        return statistics.stdev(self.qualities) if len(self.qualities) > 1 else 0.0


def read_results(paths: Iterable[str | Path], count_gflops: Callable[[str], float] | None = None) -> list[Result]:
    """
    Read results from files.

    Args:
        paths: CSV and JSON files.
        count_gflops: called with the name of a model that has no GFLOPs in the files.

    Returns:
        One result for each name, in the order of their first appearance.

    Raises:
        ValueError: a file cannot be understood, or a model lacks a number; the message names the file or the model.
    """
    gflops: dict[str, float] = {}
    qualities: dict[str, list[float]] = {}
    for path in map(Path, paths):
        for place, entry in _entries(path):
            name = entry.get("name") or entry.get("model")
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"{place} has no name; give each result a `name`, `gflops` and `pq`")
            found = qualities.setdefault(name, [])
            quality = _quality(entry)
            if quality is not None:
                found.append(_number(quality, f"`pq` of {place}", 100))
            cost = entry.get("gflops", entry.get("total_gflops"))
            if cost not in (None, ""):
                cost = _number(cost, f"`gflops` of {place}", math.inf)
                if not math.isclose(gflops.setdefault(name, cost), cost, rel_tol=1e-3):
                    raise ValueError(f"{place} gives {cost:g} GFLOPs for {name}, elsewhere it is {gflops[name]:g}")
    for name, values in qualities.items():
        if not values:
            raise ValueError(f"no file gives a PQ for {name}")
        if name not in gflops:
            if count_gflops is None:
                raise ValueError(
                    f"no file gives the GFLOPs of {name}; add `gflops`, or --size if it is a model to load"
                )
            gflops[name] = count_gflops(name)
    if not qualities:
        raise ValueError("the files hold no results")
    return [Result(name, gflops[name], tuple(values)) for name, values in qualities.items()]


def _entries(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The results in a file, each with its place, such as "result 2 in FILE"."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            rows = csv.DictReader(text.splitlines(), skipinitialspace=True)
            content: Any = [{str(key).strip().lower(): value for key, value in row.items()} for row in rows]
        else:
            content = json.loads(text)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"cannot read the results in {path}: {one_line(error)}") from error
    entries = content if isinstance(content, list) else [content]
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} does not hold results: a JSON object, or a list of them, with `name`, `gflops`, `pq`")
    return [(f"result {number} in {path}", entry) for number, entry in enumerate(entries, start=1)]


def _quality(entry: Mapping[str, Any]) -> Any:
    """The PQ in percent, in whichever form the file has it; None if it has none."""
    match entry:
        case {"panoptic": {"All": {"pq": int() | float() as share}}}:  # of `proscale evaluate`
            return 100 * share
        case {"pq": {"All": percent}}:  # of `examples/compare_encoders.py`
            return percent
        case {"pq": percent} if percent != "":
            return percent
    return None


def _number(value: Any, what: str, largest: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{what} is no number: {str(value)[:50]!r}") from None
    if not 0 <= number <= largest or math.isinf(number):
        raise ValueError(f"{what} is {number:g}, which is not possible")
    return number


def draw_cost_and_quality(results: Sequence[Result], baseline: str | None = None) -> Image.Image:
    """
    Draw figure 10.

    Args:
        results: the models.
        baseline: name of the model that the dashed lines go through; by default the first one.

    Returns:
        The figure. Bars are standard deviations, where a model was measured several times.

    Raises:
        ValueError: there is no result of the baseline's name.
    """
    names = [result.name for result in results]
    if baseline is not None and baseline not in names:
        raise ValueError(f"there is no result named {baseline!r}; there are {', '.join(names)}")
    reference = results[0 if baseline is None else names.index(baseline)]
    with plot_style():
        figure = Figure(figsize=(7.5, 4.8))
        axes = figure.add_subplot()
        axes.axhline(reference.quality, color="red", ls="--", lw=1)
        axes.axvline(reference.gflops, color="red", ls="--", lw=1)
        for result in results:
            color = "red" if result is reference else COLORS[0]
            axes.errorbar(result.gflops, result.quality, result.deviation or None, fmt="o", color=color, capsize=3)
        axes.set_xlabel("GFLOPs of one image")
        axes.set_ylabel("PQ (%)")
        axes.margins(0.12)
        axes.grid(alpha=0.3)
        _write_names(axes, results, reference)
        return to_picture(figure)


def _write_names(axes: Axes, results: Sequence[Result], reference: Result) -> None:
    """Puts each name beside its point, where it covers the least of points, lines and names placed before it."""
    FigureCanvasAgg(axes.figure).draw()  # settles where the points are
    points = [tuple(axes.transData.transform((result.gflops, result.quality))) for result in results]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    (left, bottom, right, top), (x, y) = axes.bbox.extents, points[results.index(reference)]
    taken += [(left, y - 1, right, y + 1), (x - 1, bottom, x + 1, top)]
    for result, (x, y) in zip(results, points, strict=True):
        place = {"xy": (result.gflops, result.quality), "xytext": (0, 0), "textcoords": "offset pixels"}
        text = axes.annotate(shortened(result.name), **place, fontsize=9, in_layout=False)
        left, bottom, right, top = text.get_window_extent().extents
        width, height = right - left, top - bottom
        boxes = [
            (x + dx, y + dy, x + dx + width, y + dy + height)
            for distance in (8, 20, 32)
            for dx in (distance, -width / 2, -distance - width)
            for dy in (distance, -height / 2, -distance - height)
            if dx != -width / 2 or dy != -height / 2
        ]
        box = min(boxes, key=lambda b: sum(_overlap(b, other) for other in taken) + _outside(b, axes.bbox.extents))
        text.set_position((box[0] - x, box[1] - y))
        taken.append(box)


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Pixels that two boxes (left, bottom, right, top) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Sequence[float], frame: Sequence[float]) -> float:
    """Pixels of a box outside of another."""
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)
