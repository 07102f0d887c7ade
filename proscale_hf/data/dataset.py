"""What a data set is (`SegmentationSource`), and any of them for PyTorch, lazily read (`SegmentationDataset`).

A new data set says four things: which categories there are, which images, what to read for one of them, and which files
the list of images depends on. For pictures in `images/` and, under the same names, maps of category ids in `maps/`:

    from pathlib import Path
    from proscale_hf.data.reading import label_finder, read_image, read_value_map, segments_from_values
    from proscale_hf.data.sample import Sample
    from proscale_hf.data.dataset import SegmentationDataset, SegmentationSource, choose_categories

    class Fields(SegmentationSource):
        def __init__(self, root):
            self.root = Path(root)
            self.categories = choose_categories(self.root / "categories.json")

        def files(self):
            return [self.root / "images"]

        def rows(self):
            for path in sorted((self.root / "images").iterdir()):
                yield {"image_id": path.stem, "image": str(path), "map": str(self.root / "maps" / f"{path.stem}.png")}

        def read(self, row):
            find_label = label_finder(self.categories)
            segment_map, segments = segments_from_values(read_value_map(row["map"]), find_label, row["map"])
            return Sample(read_image(row["image"]), row["image_id"], row["image"], segments, segment_map)

    dataset = SegmentationDataset(Fields("fields"))
"""

import os
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from datasets.arrow_writer import SchemaInferenceError
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from transformers.utils import logging

from proscale_hf.data.categories import CATEGORY_SETS, check_names, load_categories, read_categories
from proscale_hf.data.sample import Sample, SampleError
from proscale_hf.files.reading import FileError
from proscale_hf.files.text import few, one_line
from proscale_hf.processing.categories import check_categories
from proscale_hf.version import __version__
from proscale_hf.visualization import segment_color


logger = logging.get_logger(__name__)


class SegmentationSource(ABC):
    """What a data set is. Its state must be plain: options, paths, categories.

    Attributes:
        categories: in label order, each a dict as in COCO's panoptic JSON: "id" (the data set's own), "name", "isthing"
            (1 or 0) and "color" (red, green, blue).
        tasks: what the annotations are the truth for, of "panoptic", "instance" and "semantic".
    """

    categories: list[dict[str, Any]]
    tasks: tuple[str, ...] = ("panoptic", "instance", "semantic")

    @abstractmethod
    def files(self) -> Iterable[str | Path]:
        """The files and folders that `rows` reads. When one of them changes, the rows are made anew."""

    @abstractmethod
    def rows(self) -> Iterable[dict[str, Any]]:
        """One row per image: `image_id`, `image` (its path), and whatever else `read` needs, as numbers and texts.

        A column keeps one type; there is no None. Nothing is read here that can wait for `read`.

        Raises:
            ValueError: what is wrong with the data set, in one line.
        """

    def says_empty(self, row: dict[str, Any]) -> bool:
        """Whether a row tells, without reading its files, that there is no object to train on."""
        return False

    @abstractmethod
    def read(self, row: dict[str, Any]) -> Sample:
        """Read image and annotation of one row.

        Raises:
            SampleError: they cannot be used.
        """


class SegmentationDataset(torch.utils.data.Dataset):
    """The images of a source with their segments, each read when it is asked for.

    The rows lie in an Arrow file in the cache of `datasets` (`HF_DATASETS_CACHE`), mapped into memory, so that a copy
    for each worker costs nothing. It is made once, and again when the source's options or files change.

    Args:
        source: what to read.
        on_error: what an image or annotation that cannot be used does: "raise" a SampleError that names it, or "skip"
            it, taking the next one that can be.

    Attributes:
        rows: the `datasets.Dataset` of the source's rows.

    Raises:
        ValueError: the rows cannot be made or stored; one line.
    """

    def __init__(self, source: SegmentationSource, on_error: Literal["raise", "skip"] = "raise"):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be raise or skip, got {on_error!r}.")
        self.source = source
        self.on_error = on_error
        place = next(map(str, source.files()), type(source).__name__)
        self._use_rows(cached_rows(source.rows, rows_fingerprint(source), f"list of images of {place}"))

    def _use_rows(self, rows: datasets.Dataset) -> None:
        self.rows = rows
        # One byte per image, in memory that the workers of a DataLoader share.
        self._is_bad = torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    @property
    def categories(self) -> list[dict[str, Any]]:
        """The source's categories, in label order."""
        return self.source.categories

    @property
    def skipped(self) -> list[str]:
        """The image files that were left out so far, by this process and its DataLoader workers."""
        return self.rows.select(self._is_bad.nonzero().flatten().tolist())["image"][:]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        if self.on_error == "raise":
            return self.read(index)
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if self._is_bad[candidate]:
                continue
            try:
                return self.read(candidate)
            except SampleError as error:
                self._is_bad[candidate] = True
                logger.warning(f"Left out: {error}")
        raise SampleError(f"None of the {len(self)} images can be used; the first is {self.rows[0]['image']}.")

    def read(self, index: int) -> Sample:
        """One image and its segments, whatever `on_error` says.

        Raises:
            SampleError: they cannot be used.
        """
        sample = self.source.read(self.rows[index])
        labels = {segment["label_id"] for segment in sample.segments}
        if unknown := labels - set(range(len(self.categories))):
            raise SampleError(
                f"{sample.file_name}: labels {few(unknown)} are not among the {len(self.categories)} categories."
            )
        return sample

    def select(self, indices: Iterable[int]) -> "SegmentationDataset":
        """The images at these positions, as a data set of their own."""
        return self._with_rows(self.rows.select(indices))

    def shard(self, count: int, index: int) -> "SegmentationDataset":
        """Part `index` of `count`, which differ in size by one image at most."""
        return self._with_rows(self.rows.shard(count, index))

    def _with_rows(self, rows: datasets.Dataset) -> "SegmentationDataset":
        part = type(self).__new__(type(self))
        part.source, part.on_error = self.source, self.on_error
        part._use_rows(rows)
        return part


def rows_fingerprint(source: SegmentationSource) -> str:
    """Differs when rows may: options, files, or the code that makes them."""
    code = type(source).rows.__code__
    return Hasher.hash((type(source).__qualname__, code, __version__, vars(source), file_states(source.files())))


def cached_rows(make_rows: Callable[[], Iterable[dict[str, Any]]], fingerprint: str, name: str) -> datasets.Dataset:
    """Rows from the cache of `datasets`, where they are put if they are not there.

    Args:
        make_rows: called to make them, one by one.
        fingerprint: of everything that they depend on.
        name: what the rows are, for messages.

    Raises:
        ValueError: they cannot be made or stored, or there are none; one line. Nothing half-made is left.
    """
    try:
        return datasets.Dataset.from_generator(make_rows, fingerprint=fingerprint)
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, SchemaInferenceError):
            raise ValueError(f"The {name} is empty.") from None
        if isinstance(cause, OSError):
            raise ValueError(
                f"The {name} cannot be kept in {datasets.config.HF_DATASETS_CACHE} ({one_line(cause)}); "
                "set HF_DATASETS_CACHE to a folder that can be written."
            ) from error
        if type(cause) is ValueError or isinstance(cause, FileError | SampleError):
            raise cause from None
        raise ValueError(f"The {name} cannot be made: {one_line(cause)}.") from error


def file_states(paths: Iterable[str | Path]) -> Sequence[tuple[str, int, int]]:
    """Absolute path, bytes and time of change of files and folders.

    Raises:
        ValueError: one is not there.
    """
    states = []
    for path in paths:
        try:
            state = os.stat(path)
        except OSError:
            raise ValueError(f"There is no file or folder {path}; check the path.") from None
        states.append((os.path.abspath(path), state.st_size, state.st_mtime_ns))
    return states


def choose_categories(
    given: str | Path | list[dict[str, Any]], own_names: Mapping[int, str] | None = None, source: str = ""
) -> list[dict[str, Any]]:
    """Categories that an option names, complete.

    Args:
        given: a name of `CATEGORY_SETS`, a file that `read_categories` takes, or the list itself.
        own_names: what the data set itself calls the ids, if it does.
        source: where it does, for messages.

    Raises:
        ValueError: there is no such set or file, it does not say what it should, or contradicts the data set.
    """
    is_known_set = not isinstance(given, list) and given in CATEGORY_SETS
    if is_known_set:
        categories = load_categories(given)
    elif isinstance(given, list):
        categories = complete_categories(given)
    else:
        try:
            categories = complete_categories(read_categories(given))
        except ValueError as error:
            raise ValueError(f"{error} Category sets by name: {', '.join(CATEGORY_SETS)}.") from error
    check_names(categories, own_names or {}, source, is_known_set)
    return categories


def complete_categories(categories: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Categories with the four keys that a source's have; those without a colour get one.

    Raises:
        ValueError: one is not right, or does not say whether it is a thing.
    """
    check_categories(categories)
    if silent := [category["name"] for category in categories if "isthing" not in category]:
        raise ValueError(f'each category must say "isthing": 1 or 0; missing in {reprlib.repr(silent)}.')
    return [
        {
            "id": category["id"],
            "name": category["name"],
            "isthing": category["isthing"],
            "color": list(category.get("color", segment_color(label))),
        }
        for label, category in enumerate(categories)
    ]
