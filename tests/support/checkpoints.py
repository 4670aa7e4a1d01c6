"""Small checkpoints of three ranks that hold unlike pieces, written without torch: for tests of what is on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoint.manifest import FIELDS, Cut
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.writer import PieceArrays, prune, publish, working_folder, write_part

WORLD = 3
EMBED, NORM, LORA = "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.o_proj.lora_A.weight"
SHAPES = {EMBED: (6, 4), NORM: (5,), LORA: (3, 8)}
PIECES: list[tuple[int, str, Cut, int, int]] = [
    (0, EMBED, (0, 0, 4), 0, 16),
    (1, EMBED, (0, 4, 6), 0, 3),
    (2, EMBED, (0, 4, 6), 3, 8),
    (0, NORM, None, 0, 5),
    (0, LORA, (1, 0, 4), 0, 12),
    (1, LORA, (1, 4, 8), 0, 5),
    (2, LORA, (1, 4, 8), 5, 12),
]
MANIFEST: dict[str, Any] = {"updates": 1, "config": {}, "base": "b", "base_hash": "b", "layout": {"dp": 3}}


def state_at(step: int) -> dict[str, dict[str, np.ndarray]]:
    """Name -> field -> whole tensor, another one at every step."""
    rng = np.random.default_rng(step)
    return {
        name: {field: rng.standard_normal(shape).astype(np.float32) for field in FIELDS}
        for name, shape in SHAPES.items()
    }


def pieces_of(step: int, rank: int) -> list[PieceArrays]:
    """What a rank holds of it."""
    state, found = state_at(step), []
    for owner, name, cut, start, stop in PIECES:
        if owner == rank:
            arrays = {}
            for field, whole in state[name].items():
                block = whole if cut is None else np.take(whole, range(cut[1], cut[2]), axis=cut[0])
                arrays[field] = np.ascontiguousarray(block).reshape(-1)[start:stop]
            found.append(PieceArrays(name, SHAPES[name], cut, start, stop, arrays))
    return found


def write(folder: Path, step: int, keep: int = 9, keep_every: int = 0, **manifest: Any) -> Path:
    """A whole checkpoint, as three ranks would write it one after the other."""
    for rank in range(WORLD):
        rng = {"cpu": np.full(3, rank, np.uint8)}
        write_part(working_folder(folder, step), rank, pieces_of(step, rank), rng)
    final = publish(folder, step, WORLD, MANIFEST | manifest)
    prune(folder, keep, keep_every)
    return final


def holds(folder: Path, step: int) -> bool:
    """Whether a checkpoint has the state of `step`, to the bit."""
    state = state_at(step)
    with CheckpointReader(folder) as reader:
        return all(
            np.array_equal(reader.whole(name, field), whole)
            for name, fields in state.items()
            for field, whole in fields.items()
        )
