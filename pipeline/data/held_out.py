"""Documents held out of training, chosen one by one by what they begin with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline.data.records import Piece

BUT_FOR, HELD_OUT = "but for ", "held out "
"""Names of the sides, before the share."""
DECISIVE = 4096
"""Characters that decide."""


@dataclass(frozen=True)
class Part:
    """One side of a split of documents, or (share 0) all of them.

    A document's side follows from its first `DECISIVE` characters alone: copies of it are on one side, and what is
    added to a corpus moves nothing that was there.
    """

    share: float = 0.0
    """Of the documents that are held out, in [0, 1)."""
    held_out: bool = False
    """These, and not the others."""

    @property
    def name(self) -> str:
        """As manifests keep it; empty: all documents."""
        return f"{HELD_OUT if self.held_out else BUT_FOR}{self.share:g}" if self.share else ""

    def takes(self, text: str) -> bool:
        """Whether a document is on this side.

        Args:
            text: all of it, or of a long one its first piece.
        """
        if not self.share:
            return True
        # So much of a long document's first piece is there in every form it comes in.
        begin = text[:DECISIVE].encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(begin, digest_size=8).digest()
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
