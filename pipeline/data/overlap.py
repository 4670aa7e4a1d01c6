"""Is the evaluation text among the training text? By the files' content, and by passages looked for in the tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.data.held_out import BUT_FOR, HELD_OUT
from pipeline.data.shards import TokenShards
from pipeline.reporting.words import counted

PASSAGES = 16
"""Looked for, spread evenly over the evaluation text."""
PASSAGE = 64
"""Tokens of each: longer than what unlike texts share by chance."""
TELLING = 2
"""So many passages found make a warning: one alone may be a licence or a quotation."""
SEARCHED = 1 << 26
"""Training tokens looked through at most, about a second's work."""
_CHUNK = 1 << 22


def shared_text(train: TokenShards, held_out: TokenShards) -> str:
    """One sentence on what the evaluation text shares with the training text; empty: nothing was found."""
    if train.manifest.content_hash == held_out.manifest.content_hash:
        return "eval.path: holds the very tokens of data.path, so perplexity shows what was memorized; hold text out."
    sides = [shards.manifest.part for shards in (train, held_out)]
    # Two sides of one split by document come from the same files.
    split = sides[0].startswith(BUT_FOR) and sides[1] == HELD_OUT + sides[0].removeprefix(BUT_FOR)
    trained_on = {} if split else {entry.sha256: entry.name for entry in train.manifest.sources}
    same = [entry.name for entry in held_out.manifest.sources if entry.sha256 in trained_on]
    if same:
        files = counted(len(held_out.manifest.sources), "file")
        return (
            f"eval.path: {len(same)} of its {files} {'is' if len(same) == 1 else 'are'} among the training text by "
            f"content ({same[0]}), so perplexity shows what was memorized; hold text out."
        )
    wanted = _passages(held_out)
    found = _found(train, wanted)
    if found >= min(TELLING, len(wanted)) > 0:
        return (
            f"eval.path: {found} of {len(wanted)} passages of {PASSAGE} tokens, taken evenly from it, are in the "
            "training text too, so perplexity shows what was memorized; hold text out."
        )
    return ""


def _passages(shards: TokenShards) -> list[NDArray[np.int64]]:
    if shards.scored is not None:
        # The ends of conversations: many begin alike, with one system prompt or the same tools.
        ends = np.append(shards.starts[1:], len(shards))
        picked = ends[np.unique(np.linspace(0, ends.size - 1, PASSAGES).astype(int))]
        return [np.asarray(shards.read(int(end) - PASSAGE, int(end)), np.int64) for end in picked if end >= PASSAGE]
    room = len(shards) - PASSAGE
    starts = sorted({int(start) for start in np.linspace(0, room, PASSAGES)}) if room >= 0 else []
    return [np.asarray(shards.read(start, start + PASSAGE), np.int64) for start in starts]


def _found(train: TokenShards, passages: list[NDArray[np.int64]]) -> int:
    """How many of the passages the training tokens hold."""
    # Two neighbouring tokens make a key; the middle of a passage is no document's usual beginning.
    middle = PASSAGE // 2
    keys = {passage.tobytes(): _keys(passage[middle : middle + 2])[0] for passage in passages}
    missing = {passage.tobytes(): passage for passage in passages}
    end = min(len(train), SEARCHED)
    for start in range(0, end, _CHUNK):
        tokens = np.asarray(train.read(start, min(start + _CHUNK + PASSAGE, end)), np.int64)
        if len(tokens) < PASSAGE or not missing:
            break
        found = _keys(tokens)
        places = np.flatnonzero(np.isin(found, np.array([*keys.values()], np.uint64)))
        places = places[(places >= middle) & (places <= len(tokens) - PASSAGE + middle)]
        for name, passage in list(missing.items()):
            begins = places[found[places] == keys[name]] - middle
            # Token by token over all places at once: two common words stand together a million times.
            for offset, token in enumerate(passage):
                begins = begins[tokens[begins + offset] == token]
                if not begins.size:
                    break
            else:
                del missing[name]
    return sum(passage.tobytes() not in missing for passage in passages)


def _keys(tokens: NDArray[np.int64]) -> NDArray[np.uint64]:
    words = tokens.astype(np.uint64)
    return words[:-1] << np.uint64(32) | words[1:]
