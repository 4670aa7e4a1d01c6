"""Windows of whole conversations: packed by best fit, each attending to itself only, the loss on its answers."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from pipeline.data.chat_settings import check_trained, lengths_of
from pipeline.data.packing import IGNORE, OneStore, PackedDataset, Window, Windows
from pipeline.data.shards import TokenShards


def best_fit(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item into the fullest bin that still takes it, the longest items first.

    Items of equal length keep their order, and of equally full bins the oldest is taken, so that the result is one on
    every machine.

    Args:
        lengths: of the items, each in [1, capacity].
        capacity: of a bin.

    Returns:
        Items of every bin, in the order of the items.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []  # those that some bin has left, sorted: no more than `capacity`, however many bins there are
    having: dict[int, list[int]] = {}  # bins by room, a heap each
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            chosen = heappop(having[room])
            if not having[room]:
                del having[room], rooms[place]
            bins[chosen].append(item)
        else:
            room, chosen = capacity, len(bins)
            bins.append([item])
        left = room - length
        if left:
            if left not in having:
                having[left] = []
                insort(rooms, left)
            heappush(having[left], chosen)
    return [sorted(items) for items in bins]


class SampleDataset(OneStore):
    """Windows of `sequence` tokens, each of whole conversations and padding at its end.

    A token's label is the next token of its conversation where that is scored, else IGNORE; padding (EOS) is a document
    of its own that is not scored.

    Args:
        shards: prepared conversations.
        sequence: S, tokens.
        first: only so many of them, the first ones; None: all.

    Raises:
        DataError: a conversation is longer than a window.
    """

    def __init__(self, shards: TokenShards, sequence: int, first: int | None = None) -> None:
        if shards.scored is None:
            raise ValueError("these shards hold text, not conversations")
        self.sequence = sequence
        self._scored = shards.scored
        self._lengths = lengths_of(shards.starts, len(shards))[:first]
        check_trained(shards.folder, self.longest, sequence, True)
        self._bins = best_fit(self._lengths, sequence)
        super().__init__(shards, len(self._bins))

    @property
    def conversations(self) -> int:
        """How many there are."""
        return int(self._lengths.size)

    @property
    def longest(self) -> int:
        """Tokens of the longest one."""
        return int(self._lengths.max())

    @property
    def fill(self) -> float:
        """Share of the windows' tokens that are of conversations; the others are padding."""
        return int(self._lengths.sum()) / (len(self) * self.sequence)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what the windows hold: the conversations, their masks and S."""
        return hashlib.sha256(f"best-fit {self.shards.fingerprint} {self.sequence}".encode()).hexdigest()

    def documents(self, index: int) -> list[int]:
        """Conversations of window `index`, as the prepared folder counts them."""
        return list(self._bins[index])

    def window(self, index: int, mask_documents: bool = True) -> Window:
        """Window `index`; `document_ids` count its conversations from 0.

        Args:
            index: in [0, len(self)).
            mask_documents: must be true, see `training_windows`.

        Raises:
            IndexError: no such window.
            DataError: the shard holds an id outside the vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        if not mask_documents:
            raise ValueError("conversations of one window do not attend to each other")
        tokens = np.full(self.sequence, self.shards.manifest.eos_id, np.int64)
        labels = np.full(self.sequence, IGNORE, np.int64)
        items = self._bins[index]
        documents = np.full(self.sequence, len(items), np.int32)
        at = 0
        for number, item in enumerate(items):
            start, length = int(self.shards.starts[item]), int(self._lengths[item])
            ids = self.shards.read(start, start + length)
            scored = self._scored[start : start + length] != 0
            tokens[at : at + length] = ids
            labels[at : at + length - 1] = np.where(scored[1:], ids[1:], IGNORE)
            documents[at : at + length] = number
            at += length
        return Window(tokens, labels, documents)


def training_windows(shards: TokenShards, sequence: int, mask_documents: bool) -> Windows:
    """The windows that prepared tokens are trained in: of packed text, or of whole conversations.

    Raises:
        ConfigError: conversations would attend to each other.
        DataError: see `PackedDataset` and `SampleDataset`.
    """
    if shards.scored is None:
        return PackedDataset(shards, sequence)
    check_trained(shards.folder, None, sequence, mask_documents)
    return SampleDataset(shards, sequence)
