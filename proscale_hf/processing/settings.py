"""The settings of an image processor, checked: they may come from a file that anybody wrote."""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any

from transformers.image_utils import PILImageResampling, SizeDict

from proscale_hf.files.text import shown


LARGEST_SIDE = 2**16  # pixels
LARGEST_NUMBER = 2**31 - 1  # of ids


class SettingsError(ValueError):
    """A setting has a value that is not possible; the text is one line that names the setting."""


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses values that are not possible.

    Args:
        settings: by name, as an image processor takes them. None stands for the default, and names that are not known
            here are passed over.

    Raises:
        SettingsError: one line that names the setting, and says what is possible.
    """
    values = {name: _plain(value) for name, value in settings.items() if name in RULES and value is not None}
    for name, value in values.items():
        is_possible, form = RULES[name]
        if not is_possible(value):
            raise SettingsError(f"`{name}` must be {form}, got {shown(value)}")
    mean, std = values.get("image_mean"), values.get("image_std")
    if _is_list(mean) and _is_list(std) and len(mean) != len(std):
        raise SettingsError(f"`image_mean` has {len(mean)} numbers, and `image_std` has {len(std)}")


def _plain(value: Any) -> Any:
    """Arrays and tensors as numbers and lists, and transformers' sizes as dictionaries."""
    return dict(value) if isinstance(value, SizeDict) else value.tolist() if hasattr(value, "tolist") else value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_whole(lowest: int, highest: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Integral) and not isinstance(value, bool) and lowest <= value <= highest


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < 1e30 and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _one_or_each(is_possible: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: all(map(is_possible, value)) and len(value) > 0 if _is_list(value) else is_possible(value)


_is_side = _is_whole(1, LARGEST_SIDE)
_is_id = _is_whole(0, LARGEST_NUMBER)


def _is_size(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and (side is None or _is_side(side)) for name, side in value.items())
    return _one_or_each(_is_side)(value)


def _is_resampling(value: Any) -> bool:
    return not isinstance(value, Integral) or value in {int(filter_) for filter_ in PILImageResampling}


def _is_set_of_ids(value: Any) -> bool:
    return (_is_list(value) or isinstance(value, Set)) and all(map(_is_id, value))


_SWITCH = (lambda value: isinstance(value, bool)), "true or false"
_SIZE = _is_size, f"sides of 1 to {LARGEST_SIDE} pixels"
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_reduce_labels"), _SWITCH),
    **dict.fromkeys(("size", "pad_size"), _SIZE),
    "size_divisor": (_is_whole(0, LARGEST_SIDE), f"a whole number from 0 to {LARGEST_SIDE}"),
    "resample": (_is_resampling, "one of Pillow's filters, such as 2 for bilinear"),
    "rescale_factor": (_is_positive, "a number greater than 0"),
    "image_mean": (_one_or_each(_is_number), "a number, or a list of one for each channel"),
    "image_std": (_one_or_each(_is_positive), "a number greater than 0, or a list of one for each channel"),
    "ignore_index": (_is_whole(-LARGEST_NUMBER, LARGEST_NUMBER), "a whole number"),
    "num_labels": (_is_whole(1, LARGEST_NUMBER), "a whole number of at least 1"),
    "label_ids_to_fuse": (_is_set_of_ids, "a list of label ids"),
    "top_k": (_is_whole(1, LARGEST_NUMBER), "a whole number of at least 1"),
}
