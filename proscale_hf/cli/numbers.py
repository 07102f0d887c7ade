"""Numbers and sizes of images on the command line."""

import argparse


def whole_number(text: str, lowest: int, highest: int) -> int:
    """A whole number within bounds, from the command line."""
    if not text.isdecimal() or not lowest <= int(text) <= highest:
        raise argparse.ArgumentTypeError(f"{text!r} is not a possible number")
    return int(text)


def natural(text: str) -> int:
    """0 or more, from the command line."""
    return whole_number(text, 0, 10**9)


def positive(text: str) -> int:
    """1 or more, from the command line."""
    number = natural(text)
    if number == 0:
        raise argparse.ArgumentTypeError("0 is too few")
    return number


def image_size(text: str) -> tuple[int, int]:
    """`"800x1333"`: height and width, from the command line."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH")
    return positive(height), positive(width)


def input_size(text: str) -> tuple[int, int]:
    """As `image_size`, for an image that a model is run on: sides of 32 to 8192 pixels."""
    height, width = image_size(text)
    if not (32 <= height <= 8192 and 32 <= width <= 8192):
        raise argparse.ArgumentTypeError(f"{text!r} must have sides of 32 to 8192 pixels")
    return height, width


def share(text: str) -> float:
    """A number from 0 to 1, from the command line."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number
