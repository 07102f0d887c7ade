"""Whole numbers on the command line."""

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
