"""Own pictures with maps of ids, in a folder, without any JSON but the list of categories."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from proscale_hf.data.categories import names_by_id, read_categories
from proscale_hf.data.dataset import SegmentationSource, choose_categories
from proscale_hf.data.reading import color_ids_of, label_finder, open_map, read_image, segments_from_values, values_of
from proscale_hf.data.sample import Sample
from proscale_hf.data.sources.partners import common_names, files_by_name


FORMS = ("semantic", "instance")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
INSTANCES = 1000  # values per category in maps of instances


class ImageFolder(SegmentationSource):
    """A folder of images and one of id maps, with the same names.

        root/images/a.jpg  root/annotations/a.png  root/categories.json

    or, with a split, `root/{split}/images/` and `root/{split}/annotations/`; the categories stay in `root`.

    Args:
        root: the folder.
        split: a folder in `root`, if there are several.
        form: what the maps hold. "semantic": a category id per pixel, in one channel of 8 or 16 bits, with a palette or
            without; a category is one segment. "instance": category id * 1000 + number of the object, in one channel
            of 16 bits or as red + 256 green + 256^2 blue; equal values are one segment.
        void: values that mean nobody knows. Default: of 0 and 255 those that stand for no category.
        categories: a name of `CATEGORY_SETS`, or a file that `read_categories` takes; default `root/categories.json`,
            which they must not contradict if it is there, too.

    Raises:
        ValueError: files are not there, or an option is wrong; one line.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        form: Literal["semantic", "instance"] = "semantic",
        void: int | Sequence[int] | None = None,
        categories: str | Path | list[dict[str, Any]] | None = None,
    ):
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}.")
        root = Path(root).absolute()
        self.folder = root if split is None else root / split
        self.form = form
        self.tasks = ("semantic",) if form == "semantic" else SegmentationSource.tasks
        self.void = void
        self.categories = _categories(root / "categories.json", categories)
        label_finder(self.categories, void)  # refuses what cannot be void

    def files(self) -> list[Path]:
        return [self.folder / "images", self.folder / "annotations"]

    def rows(self) -> Iterator[dict[str, str]]:
        image_folder, map_folder = self.files()
        images = files_by_name(image_folder.iterdir(), IMAGE_SUFFIXES)
        maps = files_by_name(map_folder.iterdir(), [".png"])
        for name in common_names({image_folder: images, map_folder: maps}):
            yield {"image_id": name, "image": str(images[name]), "annotation": str(maps[name])}

    def read(self, row: dict[str, Any]) -> Sample:
        picture = open_map(row["annotation"])
        if self.form == "instance":
            read_ids = values_of if len(picture.getbands()) == 1 else color_ids_of
            find_label = label_finder(self.categories, self.void, lambda value: value // INSTANCES)
        else:
            read_ids, find_label = values_of, label_finder(self.categories, self.void)
        values = read_ids(picture, row["annotation"])
        segment_map, segments = segments_from_values(values, find_label, row["annotation"])
        return Sample(read_image(row["image"]), row["image_id"], row["image"], segments, segment_map)


def _categories(path: Path, given: str | Path | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The categories of a folder, from its own file or an option."""
    if given is None:
        return choose_categories(path)
    own = []
    if path.is_file():
        with contextlib.suppress(ValueError):  # an option helps where the file is of no use
            own = read_categories(path)
    return choose_categories(given, names_by_id(own), str(path))
