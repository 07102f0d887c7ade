"""Whole numbers and sizes of images on the command line."""

import argparse


def natural(text: str) -> int:
    """0 or more, from the command line."""
    if not text.isdecimal() or int(text) > 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a possible number")
    return int(text)


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
