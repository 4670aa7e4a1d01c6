"""Token ids that other programs wrote: Megatron's .bin and .idx, and flat arrays (LongLoRA's and nanoGPT's .bin).

They become the shards that training reads. Which tokenizer made them they do not say: ids outside the vocabulary of the
one that is given are refused, and the manifest keeps whether every document begins with its BOS and ends with its EOS.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel.errors import DataError
from pipeline.data.card import Notes
from pipeline.data.document_ends import Ends
from pipeline.data.kinds import INDEX_MAGIC
from pipeline.data.once import describe, intact, named, once, same_files
from pipeline.data.shard_writer import ShardWriter
from pipeline.data.shards import Manifest
from pipeline.data.tokenizer import TextTokenizer

FLAT = ("uint16", "uint32", "int32", "int64")
"""What a flat file may hold, little-endian."""
# megatron.core.datasets.indexed_dataset: the magic, version, code of the dtype, sequences, ends of documents; then
# int32 tokens and int64 place in bytes of every sequence, and int64 first sequence of every document and the end.
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_BATCH = 1 << 22
"""Tokens in memory at once, but for a document that is longer."""

Batch = tuple[NDArray[Any], NDArray[np.int64], int]
"""Ids, tokens of every document that ends, tokens of one that goes on; see `ShardWriter.add`."""


def megatron_index(path: Path) -> Path | None:
    """The .idx of Megatron's pair that `path` names by either file; None: it is no such file."""
    index = path.with_suffix(".idx") if path.suffix == ".bin" else path
    try:
        with index.open("rb") as stream:
            return index if stream.read(len(INDEX_MAGIC)) == INDEX_MAGIC else None
    except OSError:
        return None


class MegatronFile:
    """A pair of X.idx and X.bin.

    Raises:
        DataError: one is missing or damaged, or holds something else than ids of text.
    """

    kind = "Megatron"

    def __init__(self, index: Path) -> None:
        self._data = index.with_suffix(".bin")
        self.files = (self._data, index)
        try:
            size, of_data = index.stat().st_size, self._data.stat().st_size
            with index.open("rb") as stream:
                head = stream.read(_HEADER.size)
                if len(head) < _HEADER.size:
                    raise _damaged(index, "it ends early")
                _, version, code, sequences, ends = _HEADER.unpack(head)
                expected = _HEADER.size + 12 * sequences + 8 * ends
                if version != 1:
                    raise DataError(f"{index}: is of version {version} of Megatron's index, and 1 is read; convert it.")
                if size == expected + sequences and sequences:
                    raise DataError(f"{index}: is of a multimodal data set, of which text alone cannot be read.")
                if size != expected or not sequences or ends < 2:
                    raise _damaged(index, f"it has {size} bytes where its header says {expected}")
                self._lengths = np.fromfile(stream, "<i4", sequences).astype(np.int64)
                self._places = np.fromfile(stream, "<i8", sequences)
                self._firsts = np.fromfile(stream, "<i8", ends)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}); copy it beside {index}.") from error
        if code not in _CODES:
            raise DataError(f"{index}: holds no token ids (its dtype has the code {code}); give the index of a text.")
        self._dtype = np.dtype(_CODES[code]).newbyteorder("<")
        item = self._dtype.itemsize
        reach = self._places + self._lengths * item
        if (
            (self._lengths < 0).any()
            or (self._places < 0).any()
            or (reach > of_data).any()
            or (self._places % item).any()
        ):
            raise _damaged(index, f"a sequence lies outside of {self._data.name}")
        if self._firsts[0] != 0 or self._firsts[-1] != sequences or (np.diff(self._firsts) < 0).any():
            raise _damaged(index, "its documents do not hold its sequences")
        self._before = np.concatenate(([0], np.cumsum(self._lengths)))
        self.tokens = int(self._before[-1])

    def batches(self, tokenizer: TextTokenizer) -> Iterator[Batch]:
        """All documents in order, some at a time."""
        if not self.tokens:
            return
        ids = np.memmap(self._data, self._dtype, "r")
        item = self._dtype.itemsize
        edges = self._before[self._firsts]
        first = 0
        while first < edges.size - 1:
            last = max(first + 1, int(np.searchsorted(edges, edges[first] + _BATCH, side="right")) - 1)
            sequences = slice(int(self._firsts[first]), int(self._firsts[last]))
            starts, lengths = self._places[sequences] // item, self._lengths[sequences]
            parts = [ids[start : start + count] for start, count in _runs(starts, lengths)]
            yield np.concatenate(parts) if parts else ids[:0], np.diff(edges[first : last + 1]), 0
            first = last


def _runs(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Start and length of the stretches that sequences make which follow each other without a gap."""
    if not starts.size:
        return
    edges = np.flatnonzero(starts[1:] != starts[:-1] + lengths[:-1]) + 1
    for first, last in zip([0, *edges.tolist()], [*edges.tolist(), starts.size], strict=True):
        yield int(starts[first]), int(lengths[first:last].sum())


def _damaged(index: Path, how: str) -> DataError:
    return DataError(f"{index}: is a damaged Megatron index ({how}); copy it and its .bin again.")


@dataclass(frozen=True)
class FlatFile:
    """An array of ids without a header; a document ends behind every EOS, or, where there is none, before every BOS."""

    file: Path
    dtype: str
    """One of `FLAT`."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The one file."""
        return (self.file,)

    @property
    def kind(self) -> str:
        """As manifests keep it."""
        return self.dtype

    @property
    def tokens(self) -> int:
        """Ids in it."""
        return len(self._ids())

    def _ids(self) -> NDArray[Any]:
        item = np.dtype(self.dtype).itemsize
        try:
            size = self.file.stat().st_size
            if size % item or not size:
                raise DataError(f"{self.file}: its {size} bytes are no array of {self.dtype}; give the type it has.")
            return np.memmap(self.file, np.dtype(self.dtype).newbyteorder("<"), "r")
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read ({error.strerror}); mend or remove it.") from error

    def batches(self, tokenizer: TextTokenizer) -> Iterator[Batch]:
        """All ids in order, `_BATCH` at a time."""
        ids = self._ids()
        self._refuse_halves(ids[:_BATCH])
        chunks = range(0, len(ids), _BATCH)
        ended = any((ids[start : start + _BATCH] == tokenizer.eos_id).any() for start in chunks)
        mark = tokenizer.eos_id if ended else tokenizer.bos_id
        for start in chunks:
            part = ids[start : start + _BATCH]
            # Behind what documents end: an EOS, or what stands before a BOS.
            edges = np.flatnonzero(part == mark) + ended if mark is not None else np.zeros(0, np.int64)
            if start == 0:
                edges = edges[edges > 0]
            if start + _BATCH >= len(ids):
                edges = np.unique(np.append(edges, part.size))
            yield part, np.diff(edges, prepend=0), int(part.size - (edges[-1] if edges.size else 0))

    def _refuse_halves(self, ids: NDArray[Any]) -> None:
        """Wider ids read as narrower ones have zeros in every second place (of little ids, little-endian)."""
        if len(ids) >= 4 and ids[::2].any() and not ids[1::2].any():
            raise DataError(
                f"{self.file}: every second {self.dtype} in it is 0, so its ids are wider; give the type they have."
            )


TokenFile = MegatronFile | FlatFile


def prepare_tokens(
    source: TokenFile, out: Path, tokenizer: TextTokenizer, progress: Callable[[int, int, int], None]
) -> Manifest:
    """Write token ids as the shard folder `out`, or leave it as it is if it is up to date.

    Args:
        tokenizer: what made them.
        progress: see `prepare.Progress`.

    Raises:
        DataError: an id is outside the vocabulary; the files are damaged or empty; see `once`.
    """
    files = named(source.files[0].parent, list(source.files))
    label = f"tokens: {source.kind}"

    def find(out: Path) -> Manifest | None:
        manifest = intact(out, tokenizer)
        fresh = manifest is not None and manifest.text_field == label and same_files(files, manifest.sources)
        return manifest if fresh else None

    def write(out: Path) -> Manifest:
        entries = describe(files)
        total = sum(entry.size for entry in entries)
        begun = ended = 0
        inside = False  # a document that the next batch goes on with
        with ShardWriter(out, tokenizer) as writer:
            for ids, lengths, unfinished in source.batches(tokenizer):
                _check(ids, tokenizer, source.files[0])
                sizes = np.append(lengths, unfinished)
                ends = np.cumsum(sizes)
                last = ends[:-1][lengths > 0] - 1
                first = (ends - sizes)[int(inside) :][sizes[int(inside) :] > 0]
                ended += int((ids[last] == tokenizer.eos_id).sum())
                begun += int((ids[first] == tokenizer.bos_id).sum())
                inside = unfinished > 0 or (inside and not lengths.size)
                writer.add(ids.astype(np.uint32), lengths, unfinished)
                progress(total * writer.tokens // max(1, source.tokens), total, writer.tokens)
            if not writer.documents:
                raise DataError(f"{source.files[0]}: holds no tokens; give a file that does.")
            # An array may be cut off within its last document.
            cut_off = isinstance(source, FlatFile) and 0 < ended == writer.documents - 1
            ends_of_all = Ends(begun == writer.documents, ended + cut_off == writer.documents)
            doubtful = [] if begun or ended else [f"no document begins with BOS or ends with EOS of {tokenizer.path}."]
            notes = Notes({"it has no tokens": writer.without_tokens}, warnings=doubtful)
            return writer.finish(entries, writer.without_tokens, label, notes=notes, ends=ends_of_all)

    return once(out, find, write)


def _check(ids: NDArray[Any], tokenizer: TextTokenizer, file: Path) -> None:
    if ids.size:
        wrong = next((int(edge) for edge in (ids.min(), ids.max()) if not 0 <= edge < tokenizer.vocab_size), None)
        if wrong is not None:
            raise DataError(
                f"{file}: holds token {wrong}, outside the vocabulary of {tokenizer.vocab_size} at {tokenizer.path}; "
                "give the tokenizer that made them, and the type they have."
            )
