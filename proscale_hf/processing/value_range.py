"""Which values of a picture are black and white: one rule for files, PIL images, arrays and tensors.

The container does not say it: the 12 bits of a camera lie in files of 16 bits, and floats may end at 1 or at 255. So
the values themselves decide, and pictures of the same values come out alike from any container.

- uint8 and bool are certain: 0 to 255, and False to True.
- Black is 0, and white is the first of 1, 255, 4095 and 65535 that no value exceeds. 1 is for floats alone.
- Resizing overshoots. So floats may go beyond black and white by a quarter.
- The largest value of an integer type is white if that is less. 32-bit integers beyond 65535 have it for white, too, if
  a value is above a sixteenth of it.
- Values of no such range are stretched: the least becomes black, and the largest becomes white.
- NaN and infinity become black.

A caller can know better. Without rescaling, floats stay as they are. With a factor for another white than 255, all
values but those of 8 bits stay as they are.

Where the rule has to guess, a `UserWarning` says so, once in a process for each kind of guess.
"""

import functools
import math
import warnings

import numpy as np


EIGHT_BIT_FACTOR = 1 / 255
WHITES = (1, 255, 4095, 65535)
OVERSHOOT = 0.25  # in floats: below black, of the largest value; beyond white, of white
SMALLEST_SHARE = 1 / 16  # of the largest value of a type; less is a picture of fewer bits


def to_eight_bits(values: np.ndarray, rescale_factor: float | None = EIGHT_BIT_FACTOR) -> np.ndarray:
    """Values from 0 for black to 255 for white, by the rule of this file.

    Args:
        values: of any shape, bool, integers or floats.
        rescale_factor: what the result will be multiplied with; `None`: it will not be rescaled.

    Returns:
        uint8 of bool and integers, float32 of floats; float32 also of what stays as it is.

    Raises:
        ValueError: the values are no real numbers.
    """
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind not in "iuf":
        raise ValueError(f"its values are {values.dtype}, not numbers")
    if values.dtype == np.uint8 or values.size == 0:
        return values
    is_float = values.dtype.kind == "f"
    if is_float:
        values = _finite_floats(values)
    is_for_255 = rescale_factor is not None and math.isclose(rescale_factor, EIGHT_BIT_FACTOR, rel_tol=0.01)
    if not is_for_255 and (is_float or rescale_factor is not None):
        return values.astype(np.float32)
    black, white = black_and_white(values)
    if (black, white) != (0, 255):
        values = (values - np.float64(black)) * (255 / (white - black))
    return values.astype(np.float32) if is_float else values.round().astype(np.uint8)


def black_and_white(values: np.ndarray) -> tuple[float, float]:
    """The values of black and white. A guess is said.

    Args:
        values: integers, or floats that are finite; at least one.
    """
    least, largest = values.min().item(), values.max().item()
    is_float = values.dtype.kind == "f"
    limit = math.inf if is_float else np.iinfo(values.dtype).max
    overshoot = OVERSHOOT if is_float else 0
    for white in WHITES if is_float else WHITES[1:]:
        if -overshoot * largest <= least and largest <= (1 + overshoot) * white:
            white = min(white, limit)
            if largest > 0 and white != (limit if limit <= WHITES[-1] else 255):
                _say_white(white)
            return 0, white
    if least >= 0 and limit < 2**32 and largest > limit * SMALLEST_SHARE:
        return 0, limit
    say_once(
        "The values of a picture are negative, or of no usual range: the least is taken for black and the largest for "
        "white. To avoid this guess, give 8-bit values, or floats from 0 to 1 with `do_rescale=False`."
    )
    return least, largest if largest > least else least + 1


def _say_white(white: int) -> None:
    if white == 1:
        known = "`do_rescale=False` says so without a guess; for values up to 255, give uint8"
    else:
        known = "for another white, pass `rescale_factor=1/white`, such as 1/65535, or give 8-bit values"
    say_once(f"No value of a picture exceeds {white}, so {white} is taken for white ({known}).")


@functools.cache
def say_once(guess: str) -> None:
    """Warns of a guess, unless it has been said in this process."""
    warnings.warn(guess, stacklevel=2)


def _finite_floats(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    is_finite = np.isfinite(values)
    if is_finite.all():
        return values
    say_once("A picture has values that are NaN or infinite: they are taken for black.")
    return np.where(is_finite, values, 0)
