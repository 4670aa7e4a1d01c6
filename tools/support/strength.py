"""How much of the training is kept, as an option of several commands."""

from __future__ import annotations

import argparse


def strength(text: str) -> float:
    """An `argparse` type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 (the base) to 1 (all of the training), got {text!r}")
    return value


STRENGTH = "weights S of the way from the base's (0) to the trained ones (1, the default)"
"""What a help says of it."""
