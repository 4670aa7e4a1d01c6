"""Token ids on disk: one logical stream of documents, most often each ended by EOS, in memory-mapped shards.

A folder holds `tokens-00000.bin`, `tokens-00001.bin`, … (little-endian uint16 if the vocabulary fits, else uint32),
`documents.npy` (int64, start of every document in the stream) and `manifest.json`. A document may continue in the next
shard. The folder is written under a temporary name, flushed to disk and renamed, so a partial one is never seen.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel.errors import DataError
from pipeline.data.folders import MEND, read_array, starts_are_sound
from pipeline.data.readings import same_tokens
from pipeline.data.tokenizer import TextTokenizer
from pipeline.storage.digest import sha256_of

FORMAT = "longspan-tokens"
VERSION = 1
MANIFEST = "manifest.json"
DOCUMENTS = "documents.npy"
SCORED = "scored.u8"
"""A byte a token of conversations: whether the loss counts it."""
SCAN_TOKENS = 1 << 28
"""Up to so many tokens are checked against the vocabulary when opened; beyond, each window is when it is read."""

_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileEntry:
    """One file of the folder."""

    name: str
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class SourceEntry:
    """One text file the tokens came from."""

    name: str
    """Relative to the source folder."""
    size: int
    """Bytes."""
    mtime_ns: int
    """Last modification, nanoseconds since the epoch."""
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a shard folder says of itself."""

    format: str
    version: int
    dtype: str
    """uint16 | uint32, little-endian."""
    vocab_size: int
    eos_id: int
    tokenizer: str
    """TextTokenizer.fingerprint."""
    text_field: str
    tokens: int
    documents: int
    skipped: int
    """Empty documents left out."""
    files: tuple[FileEntry, ...]
    """Token shards in order, then documents.npy."""
    sources: tuple[SourceEntry, ...]
    chat: str = ""
    """Of conversations: identity of the template and settings they went through; empty for text."""
    bos_id: int | None = None
    """Token put before every document of text; None: none."""
    ended: bool = True
    """Every document of text ends with `eos_id`."""
    part: str = ""
    """Which documents of the sources it holds, see `held_out.Part.name`; empty: all."""
    template: str = ""
    """Of conversations: the chat template they went through; empty where none was needed, or by an earlier release."""
    answer_ends: tuple[int, ...] = ()
    """Of conversations: ids of the tokens that end answers, ascending."""

    @property
    def ends(self) -> tuple[int | None, int | None]:
        """Ids put before and behind every document of text; None: nothing."""
        return self.bos_id, self.eos_id if self.ended else None

    @property
    def content_hash(self) -> str:
        """sha256 (hex) of what training sees: token and document files, not where or when they came from."""
        digest = hashlib.sha256(f"{self.dtype} {self.vocab_size} {self.eos_id}".encode())
        for entry in self.files:
            digest.update(entry.sha256.encode())
        return digest.hexdigest()


def token_dtype(vocab_size: int) -> str:
    """Narrowest of uint16 and uint32 that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def is_prepared(path: Path) -> bool:
    """Whether `path` looks like a shard folder (possibly a damaged one)."""
    return (path / MANIFEST).is_file() and ((path / DOCUMENTS).is_file() or any(path.glob("tokens-*.bin")))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a shard folder.

    Raises:
        DataError: it is missing, damaged, or of another version.
    """
    file = folder / MANIFEST
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format is {record['format']!r}")
        if record["version"] != VERSION:
            raise DataError(f"{file}: is of version {record['version']}, this program reads {VERSION}; {MEND}.")
        record["files"] = tuple(FileEntry(**entry) for entry in record["files"])
        record["sources"] = tuple(SourceEntry(**entry) for entry in record["sources"])
        record["answer_ends"] = tuple(record.get("answer_ends", ()))
        manifest = Manifest(**record)
        records: list[Manifest | FileEntry | SourceEntry] = [manifest, *manifest.files, *manifest.sources]
        for entry in records:
            _check_types(entry)
        if not manifest.files or manifest.files[-1].name != DOCUMENTS:
            raise ValueError(f"its files do not end with {DOCUMENTS}")
    except FileNotFoundError as error:
        raise DataError(f"{folder}: has no {MANIFEST}, so it holds no prepared tokens; {MEND}.") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{file}: is damaged ({error}); {MEND}.") from error
    return manifest


def _check_types(record: Manifest | FileEntry | SourceEntry) -> None:
    for field in fields(record):
        value = getattr(record, field.name)
        if field.type == "int" and (type(value) is not int or value < 0):
            raise ValueError(f"{field.name} is {value!r}")
        if field.type == "int | None" and value is not None and (type(value) is not int or value < 0):
            raise ValueError(f"{field.name} is {value!r}")
        if field.type in ("str", "bool") and type(value).__name__ != field.type:
            raise ValueError(f"{field.name} is {value!r}")
    if isinstance(record, Manifest) and record.dtype != token_dtype(record.vocab_size):
        raise ValueError(f"dtype {record.dtype!r} does not suit vocab_size {record.vocab_size}")
    if isinstance(record, Manifest) and record.eos_id >= record.vocab_size:
        raise ValueError(f"eos_id {record.eos_id} is outside vocab_size {record.vocab_size}")
    if isinstance(record, Manifest):
        for end in record.answer_ends:
            if type(end) is not int or not 0 <= end < record.vocab_size:
                raise ValueError(f"answer_ends has {end!r}")
    if isinstance(record, Manifest) and (record.bos_id or 0) >= record.vocab_size:
        raise ValueError(f"bos_id {record.bos_id} is outside vocab_size {record.vocab_size}")
    if isinstance(record, FileEntry) and (record.name in ("", "..") or Path(record.name).name != record.name):
        raise ValueError(f"file name {record.name!r} leaves the folder")


class TokenShards:
    """A shard folder, opened for reading; nothing is loaded but the document starts.

    Attributes:
        folder: where it is.
        manifest: what it says of itself.
        starts: first token of every document in the stream, int64 [documents], increasing.
        scored: of conversations, whether the loss counts each token, uint8 [tokens]; None for text.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        maps: list[NDArray[Any]],
        starts: NDArray[np.int64],
        scored: NDArray[np.uint8] | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.starts = starts
        self.scored = scored
        self._maps = maps
        self._ends = np.cumsum([0] + [len(array) for array in maps])

    def __len__(self) -> int:
        """Tokens in the stream, EOS included."""
        return self.manifest.tokens

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the stream's content."""
        return self.manifest.content_hash

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of the stream, int64 [stop - start].

        Raises:
            IndexError: the range leaves the stream.
            DataError: an id lies outside the vocabulary (the shard is damaged).
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) leave the stream of {len(self)}")
        out = np.empty(stop - start, np.int64)
        shard = int(np.searchsorted(self._ends, start, side="right")) - 1
        position = start
        while position < stop:
            begin, end = int(self._ends[shard]), min(int(self._ends[shard + 1]), stop)
            out[position - start : end - start] = self._maps[shard][position - begin : end - begin]
            position = end
            shard += 1
        if out.size and int(out.max()) >= self.manifest.vocab_size:
            self._outside(int(out.max()))
        return out

    def check_vocabulary(self) -> None:
        """Read every token once.

        Raises:
            DataError: an id lies outside the vocabulary.
        """
        for array in self._maps:
            for start in range(0, len(array), _CHUNK):
                largest = int(array[start : start + _CHUNK].max())
                if largest >= self.manifest.vocab_size:
                    self._outside(largest)

    def _outside(self, token: int) -> None:
        size = self.manifest.vocab_size
        raise DataError(f"{self.folder}: holds token {token}, outside the vocabulary of {size}; {MEND}.")


def open_shards(folder: Path, tokenizer: TextTokenizer | None = None, verify: bool = False) -> TokenShards:
    """Open a shard folder.

    Args:
        folder: written by `prepare`.
        tokenizer: what the tokens must have been made with; None does not check.
        verify: compare every checksum too (reads everything).

    Raises:
        DataError: files are missing, of the wrong size or content, or made with another tokenizer.
    """
    manifest = read_manifest(folder)
    if tokenizer is not None and not same_tokens(tokenizer, manifest.tokenizer, manifest.eos_id):
        raise DataError(
            f"{folder}: its tokens were made with another tokenizer than {tokenizer.path}; {MEND} and this tokenizer."
        )
    for entry in manifest.files:
        file = folder / entry.name
        if not file.is_file():
            raise DataError(f"{file}: is missing; {MEND}.")
        size = file.stat().st_size
        if size != entry.size:
            raise DataError(f"{file}: has {size} bytes where its manifest says {entry.size}; {MEND}.")
        if verify and sha256_of(file) != entry.sha256:
            raise DataError(f"{file}: is damaged (its sha256 is not the manifest's); {MEND}.")
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    shards = [folder / entry.name for entry in manifest.files if entry.name.endswith(".bin")]
    try:
        maps: list[NDArray[Any]] = [np.memmap(file, dtype=dtype, mode="r") for file in shards]
        scored = np.memmap(folder / SCORED, dtype=np.uint8, mode="r") if manifest.chat else None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be opened ({error}); {MEND}.") from error
    if scored is not None and scored.size != manifest.tokens:
        raise DataError(f"{folder / SCORED}: does not hold a mark for each of {manifest.tokens} tokens; {MEND}.")
    starts = read_array(folder / DOCUMENTS)
    if sum(map(len, maps)) != manifest.tokens:
        raise DataError(f"{folder}: its shards do not hold the {manifest.tokens} tokens its manifest counts; {MEND}.")
    if not starts_are_sound(starts, manifest.documents, manifest.tokens):
        raise DataError(f"{folder / DOCUMENTS}: is damaged (the documents do not fit the tokens); {MEND}.")
    opened = TokenShards(folder, manifest, maps, starts.astype(np.int64), scored)
    if verify or manifest.tokens <= SCAN_TOKENS:
        opened.check_vocabulary()
    return opened
