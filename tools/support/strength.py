"""How much of the training is kept, as an option of several commands."""

from __future__ import annotations

from pipeline.reporting.parser import checked

strength = checked(
    float, lambda value: 0 <= value <= 1, "a number from 0 (the base) to 1 (all of the training)", metavar="S"
)
"""An `argparse` type."""
STRENGTH = "weights S of the way from the base's (0) to the trained ones (1, the default)"
"""What a help says of it."""
