"""The header of a safetensors file: who writes one lays it out here. No torch: checkpoints are read without it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any


def layout(
    entries: Mapping[str, tuple[str, Sequence[int], int, int]], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """The bytes before the data, and the names in the order their data follows.

    Args:
        entries: name -> (dtype code, shape, bytes of an element, bytes of all).
        metadata: strings kept beside them.
    """
    # Widest elements first keeps every tensor aligned to its element size, which readers that map the file rely on.
    order = sorted(entries, key=lambda name: -entries[name][2])
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        code, shape, _, size = entries[name]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order
