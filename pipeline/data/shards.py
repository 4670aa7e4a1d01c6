"""Token ids on disk: one logical stream of documents, each ended by EOS, in memory-mapped little-endian shards.

A folder holds `tokens-00000.bin`, `tokens-00001.bin`, … (uint16 if the vocabulary fits, else uint32), `documents.npy`
(int64, start of every document in the stream) and `manifest.json`. A document may continue in the next shard. The
folder is written under a temporary name, flushed to disk and renamed, so a partial one is never seen.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel.errors import DataError
from pipeline.data.card import Notes, card_of, write_card
from pipeline.data.folders import MEND, read_array, replace_folder, sha256_of, starts_are_sound
from pipeline.data.readings import same_tokens
from pipeline.data.tokenizer import TextTokenizer
from pipeline.storage.durable import sync

FORMAT = "longspan-tokens"
VERSION = 1
MANIFEST = "manifest.json"
DOCUMENTS = "documents.npy"
SCORED = "scored.u8"
"""A byte a token of conversations: whether the loss counts it."""
MAX_SHARD_TOKENS = 1 << 28
"""512 MiB of uint16."""
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


class ShardWriter:
    """Writes a shard folder at `out`; nothing is visible there before `finish`.

    Use as a context manager: leaving without `finish` removes what was written.
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
            tokens: ids of all of them, EOS at the end of each, [sum(lengths) + unfinished].
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
        self._starts.append(starts)
        self.tokens += int(tokens.size)
        self.documents += int(lengths.size)
        written = 0
        while written < tokens.size:
            if not self._room:
                self._next_shard()
            piece = tokens[written : written + self._room]
            self._stream.write(piece.astype(self._dtype).tobytes())
            written += piece.size
            self._room -= piece.size

    def add_sample(self, tokens: NDArray[np.uint32], scored: NDArray[np.bool_]) -> None:
        """Append one conversation with its mask, as a document; not to be mixed with `add`."""
        if self._scored is None:
            self._scored = (self._folder / SCORED).open("wb")
        self.add(tokens, np.array([tokens.size], np.int64))
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
    ) -> Manifest:
        """Complete the folder, with a data card of the notes, and move it to `out`, replacing an older one there."""
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
        )
        (self._folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
        if notes is not None:
            lengths = np.diff(np.append(starts, self.tokens))
            names += write_card(self._folder, card_of(lengths, manifest.eos_id, [one.size for one in sources], notes))
        for file in [*names, MANIFEST, "."]:
            sync(self._folder / file)
        replace_folder(self._folder, self._out)
        return manifest


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
        if field.type == "str" and not isinstance(value, str):
            raise ValueError(f"{field.name} is {value!r}")
    if isinstance(record, Manifest) and record.dtype != token_dtype(record.vocab_size):
        raise ValueError(f"dtype {record.dtype!r} does not suit vocab_size {record.vocab_size}")
    if isinstance(record, Manifest) and record.eos_id >= record.vocab_size:
        raise ValueError(f"eos_id {record.eos_id} is outside vocab_size {record.vocab_size}")
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
