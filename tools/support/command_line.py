"""What the benchmarks' command lines and consoles share."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console


def add_integers(parser: argparse.ArgumentParser, *rows: tuple[str, int, str]) -> None:
    """Add options that take an integer: (flag, default, what it is)."""
    for flag, default, text in rows:
        parser.add_argument(flag, type=int, default=default, help=f"{text} (default {default})")


def console_of(width: int, **options: Any) -> Console:
    """The terminal, or, where there is none, a console of `width` columns, so that tables do not wrap."""
    return Console(width=None if Console().is_terminal else width, **options)
