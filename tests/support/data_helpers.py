"""A tokenizer that needs no library, and shard folders of given documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.shard_writer import MAX_SHARD_TOKENS, ShardWriter
from pipeline.data.shards import Manifest, TokenShards, open_shards


@dataclass(frozen=True)
class ByteTokenizer:
    """Byte b is token b + 3, below 259; EOS is 2. A larger `vocab_size` makes wider tokens on disk."""

    path: Path = Path("byte-tokenizer")
    eos_id: int = 2
    bos_id: int | None = 1
    vocab_size: int = 259
    prompt_start: tuple[int, ...] = ()
    fingerprint: str = "byte-tokenizer"

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return [byte + 3 for byte in text.encode()]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return bytes(token - 3 for token in ids if token > 2).decode(errors="replace")

    def may_cut(self, left: str, right: str) -> bool:
        """Every character is tokenized for itself."""
        return True


BYTES = ByteTokenizer()
WIDE = ByteTokenizer(vocab_size=(1 << 16) + 1, fingerprint="wide")


def write_shards(
    folder: Path,
    documents: Sequence[Sequence[int]],
    tokenizer: ByteTokenizer = BYTES,
    limit: int = MAX_SHARD_TOKENS,
    batch: int = 3,
) -> Manifest:
    """Write documents (EOS not included) as a shard folder, `batch` of them a call."""
    with ShardWriter(folder, tokenizer, limit) as writer:
        for start in range(0, len(documents), batch):
            rows = [[*ids, tokenizer.eos_id] for ids in documents[start : start + batch]]
            writer.add(np.array(sum(rows, []), np.uint32), np.array([len(row) for row in rows], np.int64))
        return writer.finish((), 0, "text")


def make_shards(folder: Path, documents: Sequence[Sequence[int]], limit: int = MAX_SHARD_TOKENS) -> TokenShards:
    """`write_shards`, opened."""
    write_shards(folder, documents, limit=limit)
    return open_shards(folder, verify=True)


def stream_of(documents: Sequence[Sequence[int]], eos: int = BYTES.eos_id) -> tuple[list[int], list[int]]:
    """The token stream and the document of every token, by a plain loop."""
    tokens, owners = [], []
    for number, ids in enumerate(documents):
        for token in [*ids, eos]:
            tokens.append(token)
            owners.append(number)
    return tokens, owners
