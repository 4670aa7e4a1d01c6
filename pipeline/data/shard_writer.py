"""Writes token shards, see `shards`: under a temporary name first, so that a partial folder is never seen."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel.errors import DataError
from pipeline.data.answer_ends import ChatFormat
from pipeline.data.card import Notes, card_of, write_card
from pipeline.data.document_ends import AUTO, Ends
from pipeline.data.folders import replace_folders
from pipeline.data.shards import (
    DOCUMENTS,
    FORMAT,
    MANIFEST,
    SCORED,
    VERSION,
    FileEntry,
    Manifest,
    SourceEntry,
    token_dtype,
)
from pipeline.data.tokenizer import TextTokenizer
from pipeline.storage.digest import sha256_of
from pipeline.storage.durable import sync

MAX_SHARD_TOKENS = 1 << 28
"""512 MiB of uint16."""


class ShardWriter:
    """Writes a shard folder at `out`; nothing is visible there before `finish`.

    Use as a context manager: leaving without `finish` removes what was written.

    Attributes:
        tokens, documents: written so far.
        without_tokens: documents left out, as no token was made of them.
    """

    def __init__(self, out: Path, tokenizer: TextTokenizer, max_shard_tokens: int = MAX_SHARD_TOKENS) -> None:
        self._out = out
        self._tokenizer = tokenizer
        self._dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
        self._limit = max_shard_tokens
        self._starts: list[NDArray[np.int64]] = []
        self._open = -1  # start of the document that is not ended yet
        self._names: list[str] = []
        self._room = 0
        self._stream: Any = None
        self._scored: Any = None
        self.tokens = 0
        self.documents = 0
        self.without_tokens = 0
        out.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.writing-", dir=out.parent))
        self._folder.chmod(0o755)  # mkdtemp's 0700 would hide the finished folder from other users

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if self._scored is not None:
            self._scored.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # renamed away by finish, so there only after a failure

    def add(self, tokens: NDArray[np.uint32], lengths: NDArray[np.int64], unfinished: int = 0) -> None:
        """Append documents.

        Args:
            tokens: ids of all of them, [sum(lengths) + unfinished].
            lengths: tokens of each, EOS included, of the first only those that are new, [documents].
            unfinished: tokens of one more document (or of the first, if there is none) that a later call ends.

        Raises:
            DataError: the tokenizer produced an id outside its vocabulary.
        """
        if tokens.size and int(tokens.max()) >= self._tokenizer.vocab_size:
            raise DataError(
                f"{self._tokenizer.path}: produced token {int(tokens.max())}, outside its vocabulary of "
                f"{self._tokenizer.vocab_size}; copy the model's tokenizer files again."
            )
        ends = np.cumsum(lengths, dtype=np.int64)
        starts = self.tokens + ends - lengths
        if self._open >= 0 and lengths.size:
            starts[0], self._open = self._open, -1
        if self._open < 0 and unfinished:
            self._open = self.tokens + int(tokens.size) - unfinished
        there = starts < ends + self.tokens  # where neither BOS nor EOS is written, a text may make no token
        self._starts.append(starts[there])
        self.tokens += int(tokens.size)
        self.documents += int(there.sum())
        self.without_tokens += int((~there).sum())
        written = 0
        while written < tokens.size:
            if not self._room:
                self._next_shard()
            piece = tokens[written : written + self._room]
            self._stream.write(piece.astype(self._dtype).tobytes())
            written += piece.size
            self._room -= piece.size

    def add_samples(self, tokens: NDArray[np.uint32], lengths: NDArray[np.int64], scored: NDArray[np.bool_]) -> None:
        """Append conversations with their masks, each as a document; not to be mixed with `add`.

        Args:
            tokens: ids of all of them, [sum(lengths)].
            lengths: tokens of each, [conversations].
            scored: whether the loss counts the token, as `tokens`.
        """
        if self._scored is None:
            self._scored = (self._folder / SCORED).open("wb")
        self.add(tokens, lengths)
        self._scored.write(scored.astype(np.uint8).tobytes())

    def _next_shard(self) -> None:
        self._close()
        self._names.append(f"tokens-{len(self._names):05d}.bin")
        self._stream = (self._folder / self._names[-1]).open("wb")
        self._room = self._limit

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def finish(
        self,
        sources: tuple[SourceEntry, ...],
        skipped: int,
        text_field: str,
        chat: str = "",
        notes: Notes | None = None,
        ends: Ends = AUTO,
        part: str = "",
        chat_format: ChatFormat | None = None,
    ) -> Manifest:
        """Complete the folder, with a data card of the notes, and move it to `out`, replacing an older one there.

        Args:
            ends: what documents of text were given at both ends.
            part: see `Manifest.part`.
            chat_format: of conversations, what they were rendered with and how answers end.
        """
        bos_id, ending = ends.ids(self._tokenizer)
        self._close()
        scored = [] if self._scored is None else [SCORED]
        if self._scored is not None:
            self._scored.close()
        starts = np.concatenate(self._starts) if self._starts else np.zeros(0, np.int64)
        np.save(self._folder / DOCUMENTS, starts.astype("<i8"), allow_pickle=False)
        names = [*self._names, *scored, DOCUMENTS]
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            dtype=token_dtype(self._tokenizer.vocab_size),
            vocab_size=self._tokenizer.vocab_size,
            eos_id=self._tokenizer.eos_id,
            tokenizer=self._tokenizer.fingerprint,
            text_field=text_field,
            tokens=self.tokens,
            documents=self.documents,
            skipped=skipped,
            files=tuple(
                FileEntry(name, (self._folder / name).stat().st_size, sha256_of(self._folder / name)) for name in names
            ),
            sources=sources,
            chat=chat,
            bos_id=bos_id,
            ended=ending is not None,
            part=part,
            template=chat_format.template if chat_format is not None else "",
            answer_ends=chat_format.ends if chat_format is not None else (),
        )
        (self._folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
        if notes is not None:
            lengths = np.diff(np.append(starts, self.tokens))
            names += write_card(self._folder, card_of(lengths, manifest.ends, [one.size for one in sources], notes))
        for file in [*names, MANIFEST, "."]:
            sync(self._folder / file)
        replace_folders({self._out: self._folder})
        return manifest
