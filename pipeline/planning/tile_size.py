"""How many tokens a tile of frozen products has; no torch, so that `planning.memory` counts with the same rule."""

from __future__ import annotations

LEAST_TOKENS = 2048
"""Tokens of a tile at least: fewer leave a GPU's matrix units waiting, for weights or for the next launch.

Twice as many under tensor parallelism, where some products are made rank by rank.
"""
TILE_ELEMENTS = 3 << 25
"""Elements of a tile that are enough, where it is narrow (bf16: 192 MiB)."""


def tile_tokens(width: int, ranks: int) -> int:
    """Tokens wanted of a tile that gathers those of `ranks`, `width` columns of which exist at once."""
    return max(LEAST_TOKENS * min(2, ranks), TILE_ELEMENTS // width)
