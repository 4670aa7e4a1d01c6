"""Documents held out of training, chosen one by one by what they begin with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline.data.records import Piece


@dataclass(frozen=True)
class Part:
    """One side of a split of documents, or (share 0) all of them.

    A document's side follows from its text alone: copies of it are on one side, and what is added to a corpus moves
    nothing that was there.
    """

    share: float = 0.0
    """Of the documents that are held out, in [0, 1)."""
    held_out: bool = False
    """These, and not the others."""

    @property
    def name(self) -> str:
        """As manifests keep it; empty: all documents."""
        return f"{'held out' if self.held_out else 'but for'} {self.share:g}" if self.share else ""

    def takes(self, text: str) -> bool:
        """Whether a document is on this side.

        Args:
            text: all of it, or of a long one its first piece.
        """
        if not self.share:
            return True
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return (int.from_bytes(digest, "big") < self.share * 2**64) == self.held_out

    def of(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces of the documents on this side."""
        begins, taken = True, True
        for piece in pieces:
            if begins:
                taken = self.takes(piece.text)
            begins = piece.ends
            if taken:
                yield piece


WHOLE = Part()
