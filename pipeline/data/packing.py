"""Fixed-length windows over the token stream, labels shifted by one, document of every token kept."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from parallel.errors import DataError
from pipeline.data.sampler import step_indices
from pipeline.data.shards import TokenShards

IGNORE = -100
"""Label of a token that is not scored: torch's own default of `cross_entropy`."""


@dataclass(frozen=True)
class Window:
    """One training sequence of S tokens."""

    tokens: NDArray[np.int64]
    """[S]."""
    labels: NDArray[np.int64]
    """The next token at every position, or IGNORE, [S]."""
    document_ids: NDArray[np.int32]
    """Index in the stream of the document each token belongs to, non-decreasing, [S]."""


class Windows(Protocol):
    """What training draws its windows from."""

    sequence: int

    @property
    def stores(self) -> tuple[TokenShards, ...]:
        """The token streams they are cut from."""

    def __len__(self) -> int:
        """Windows."""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what the windows hold."""

    def order(self, seed: int, first: int, count: int) -> NDArray[np.int64]:
        """Windows read at places [first, first + count) of a training run, int64 [count]; count is at least 1."""

    def window(self, index: int, mask_documents: bool = False) -> Window:
        """Window `index`."""

    def documents(self, index: int) -> list[int]:
        """Documents or conversations that window `index` has something of, as its prepared folder counts them."""


class OneStore:
    """What windows of one token stream have in common: they are read epoch after epoch."""

    def __init__(self, shards: TokenShards, windows: int) -> None:
        self.shards = shards
        self._windows = windows

    def __len__(self) -> int:
        """Windows."""
        return self._windows

    @property
    def stores(self) -> tuple[TokenShards, ...]:
        """The token stream they are cut from."""
        return (self.shards,)

    def order(self, seed: int, first: int, count: int) -> NDArray[np.int64]:
        """Windows read at places [first, first + count) of a training run, int64 [count]; count is at least 1."""
        return step_indices(seed, 0, count, len(self), first)


class PackedDataset(OneStore):
    """Non-overlapping windows of `sequence` tokens; window i is tokens [i S, i S + S), its labels [i S + 1, i S + S].

    Args:
        shards: the token stream.
        sequence: S, tokens.

    Raises:
        DataError: the stream has no full window.
    """

    def __init__(self, shards: TokenShards, sequence: int) -> None:
        super().__init__(shards, max(0, len(shards) - 1) // sequence)
        self.sequence = sequence
        if not self._windows:
            raise DataError(
                f"{shards.folder}: holds {len(shards)} tokens, but one window of {sequence} needs {sequence + 1}; "
                "give more text or lower the sequence length."
            )

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what the windows hold: the stream's content and S."""
        return hashlib.sha256(f"{self.shards.fingerprint} {self.sequence}".encode()).hexdigest()

    def documents(self, index: int) -> list[int]:
        """Documents that window `index` has something of, as the prepared folder counts them."""
        ids = self.window(index, True).document_ids
        return list(range(int(ids[0]), int(ids[-1]) + 1))

    def window(self, index: int, mask_documents: bool = False) -> Window:
        """Window `index`.

        Args:
            index: in [0, len(self)).
            mask_documents: give IGNORE as the label of a document's last token (its EOS), whose next token belongs to
                another document.

        Raises:
            IndexError: no such window.
            DataError: the shard holds an id outside the vocabulary.
        """
        if not 0 <= index < self._windows:
            raise IndexError(f"window {index} of {self._windows}")
        start = index * self.sequence
        tokens = self.shards.read(start, start + self.sequence + 1)
        documents = document_ids(self.shards.starts, start, tokens.size)
        labels = tokens[1:].copy()
        if mask_documents:
            labels[documents[1:] != documents[:-1]] = IGNORE
        return Window(tokens[:-1], labels, documents[:-1])


def document_ids(starts: NDArray[np.int64], start: int, count: int) -> NDArray[np.int32]:
    """Document of tokens [start, start + count), given where documents start; int32 [count]."""
    first = int(np.searchsorted(starts, start, side="right")) - 1
    last = int(np.searchsorted(starts, start + count, side="left"))
    # Only the few documents inside the window are touched, however many the stream has.
    edges = np.concatenate(([start], starts[first + 1 : last], [start + count]))
    return np.repeat(np.arange(first, last, dtype=np.int32), np.diff(edges))
