"""The classes of known data sets, with each data set's own ids, and those of a file that the user brings.

A category is a dict as in COCO's panoptic JSON: "id", which is the data set's own, "name", "isthing" (1 or 0) and
"color" (red, green, blue in 0..255). Lists are in label order: the entry at position i is what a model trained on the
data set calls label i.

Where the facts come from:

- COCO: detectron2's metadata, where the 80 things come first; the same entries as panopticapi's
  `panoptic_coco_categories.json`.
- ADE20K: the 150 classes of the scene parsing benchmark (MIT CSAIL's `sceneparsing`), each by the first of its names,
  with the benchmark's colours (road and skyscraper share one); the 100 things, and their names, are those of its
  instance annotations. In the benchmark's label images, 0 is void and class i has the value i + 1; in the panoptic
  and instance JSON that Mask2Former's scripts make of them, its id is i.
- Cityscapes: the labels that count in the evaluation, from `cityscapesscripts`.
- Mapillary Vistas 1.2: Mask2Former's metadata; checked against mmsegmentation's. Class i is i + 1 in the data set's
  panoptic JSON, and i in its label images.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from proscale_hf.processing.categories import check_categories


FOLDER = Path(__file__).with_name("categories")
KEYS = ("id", "name", "isthing", "color")
LARGEST_FILE = 32 * 2**20  # bytes


class CategorySet(NamedTuple):
    """How a set is made: from which file, whether without its stuff, and what is added to the file's ids."""

    file: str
    only_things: bool = False
    id_shift: int = 0


CATEGORY_SETS = {
    "coco_panoptic": CategorySet("coco_panoptic"),
    "coco_instance": CategorySet("coco_panoptic", only_things=True),
    "ade20k_panoptic": CategorySet("ade20k_panoptic"),
    "ade20k_instance": CategorySet("ade20k_panoptic", only_things=True),
    "ade20k_semantic": CategorySet("ade20k_panoptic", id_shift=1),
    "cityscapes": CategorySet("cityscapes"),
    "cityscapes_instance": CategorySet("cityscapes", only_things=True),
    "mapillary_vistas": CategorySet("mapillary_vistas"),
    "mapillary_vistas_semantic": CategorySet("mapillary_vistas", id_shift=-1),
}


def load_categories(name: str) -> list[dict[str, Any]]:
    """
    Args:
        name: One of `CATEGORY_SETS`.

    Returns:
        The set's categories in label order, each with all four keys.

    Raises:
        ValueError: there is no set of that name.
    """
    if name not in CATEGORY_SETS:
        raise ValueError(f"There is no category set {name!r}; known are {', '.join(CATEGORY_SETS)}.")
    file, only_things, id_shift = CATEGORY_SETS[name]
    categories = json.loads((FOLDER / f"{file}.json").read_bytes())
    return [
        {**category, "id": category["id"] + id_shift}
        for category in categories
        if category["isthing"] or not only_things
    ]


def read_categories(path: str | Path) -> list[dict[str, Any]]:
    """
    Read the categories of a data set that is not one of `CATEGORY_SETS`.

    Args:
        path: JSON file with, in label order, a list of categories (or an object that has it under "categories", as
            COCO's annotation files do) or a list of names; or an object like `id2label` in a model's `config.json`,
            {"0": "cat", "1": "dog"}. Names alone get their label for id.

    Returns:
        Categories in label order: "id" and "name", and "isthing" and "color" where the file has them.

    Raises:
        ValueError: the file cannot be read or does not say what it should; one line.
    """
    content = _read_json(Path(path))
    try:
        categories = _as_categories(content)
        check_categories(categories)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return [{key: category[key] for key in KEYS if key in category} for category in categories]


def names_by_id(categories: Iterable[Any]) -> dict[int, str]:
    """The names of those entries that have an id and a name; others are not for this function to refuse."""
    pairs = [(entry.get("id"), entry.get("name")) for entry in categories if isinstance(entry, dict)]
    return {entry_id: name for entry_id, name in pairs if type(entry_id) is int and isinstance(name, str)}


def check_names(
    categories: Sequence[Mapping[str, Any]], own_names: Mapping[int, str], source: str, is_known_set: bool = False
) -> None:
    """
    Refuse categories that call an id something else than the data set itself does.

    Args:
        categories: of somebody's choice.
        own_names: the data set's own, by id; there may be none.
        source: where those are, for messages.
        is_known_set: the categories are one of `CATEGORY_SETS`. Their names may be others, as a window is a windowpane
            elsewhere, if most are the same and none belongs to another id.

    Raises:
        ValueError: a name contradicts; one line.
    """
    names = {category["id"]: category["name"] for category in categories}
    shared = [category_id for category_id in names if category_id in own_names]
    wrong = [i for i in shared if _plain(names[i]) != _plain(own_names[i])]
    if is_known_set and 2 * len(wrong) <= len(shared):
        known, own = ({_plain(name) for name in some.values()} for some in (names, own_names))
        wrong = [i for i in wrong if _plain(names[i]) in own or _plain(own_names[i]) in known]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"The option categories calls id {wrong[0]} {names[wrong[0]]!r}, but {source} calls it "
            f"{own_names[wrong[0]]!r}{more}: give categories with the ids and names of the annotations."
        )


def _plain(name: str) -> str:
    """A name without its synonyms, capitals and ways to join words."""
    return " ".join(name.partition(",")[0].casefold().replace("_", " ").replace("-", " ").split())


def _as_categories(content: Any) -> Any:
    if isinstance(content, dict):
        if "categories" in content:
            return content["categories"]
        labels = [str(label_id) for label_id in range(len(content))]
        if set(content) != set(labels):
            raise ValueError(f"an object must have categories, or the labels 0 to {len(labels) - 1} as its keys.")
        return [{"id": label_id, "name": content[label]} for label_id, label in enumerate(labels)]
    if isinstance(content, list) and any(isinstance(entry, str) for entry in content):
        return [{"id": label_id, "name": name} for label_id, name in enumerate(content)]
    return content


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"There is no file {path}; check the path.")
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if len(text) > LARGEST_FILE:
        raise ValueError(f"{path} is larger than {LARGEST_FILE // 2**20} MiB; give a file with the categories alone.")
    try:
        return json.loads(text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an object has the same key twice")
    return values
