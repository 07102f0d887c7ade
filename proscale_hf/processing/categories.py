"""Categories as COCO's panoptic JSON has them: what each entry must have."""

import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import Any


LARGEST_CATEGORY_ID = 2**31 - 1


def check_categories(categories: Any) -> None:
    """
    Args:
        categories: What should be a list of categories as in COCO's panoptic JSON.

    Raises:
        ValueError: it is not; the message is one line that names the entry.
    """
    if not isinstance(categories, list) or not categories:
        raise ValueError(f"`categories` must be a list with at least one entry, got {reprlib.repr(categories)}.")
    for position, category in enumerate(categories):
        if not isinstance(category, Mapping):
            raise ValueError(
                f"`categories[{position}]` must be a category with `id` and `name`, got {reprlib.repr(category)}."
            )
        for key, is_valid, valid in (
            ("id", _is_category_id, f"a whole number from 0 to {LARGEST_CATEGORY_ID}"),
            ("name", _is_name, "a text that is not empty"),
            ("isthing", _is_flag, "0 or 1"),
            ("color", _is_color, "three whole numbers from 0 to 255"),
        ):
            if key in ("id", "name") or key in category:
                value = category.get(key)
                if not is_valid(value):
                    raise ValueError(f"`{key}` of `categories[{position}]` must be {valid}, got {reprlib.repr(value)}.")
    for key in ("id", "name"):
        [(value, times)] = Counter(category[key] for category in categories).most_common(1)
        if times > 1:
            raise ValueError(f"`{key}` {reprlib.repr(value)} occurs {times} times in `categories`; it must be unique.")


def _is_category_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_CATEGORY_ID


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_flag(value: Any) -> bool:
    return type(value) is int and value in (0, 1)


def _is_color(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(type(v) is int and 0 <= v <= 255 for v in value)
