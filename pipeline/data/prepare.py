"""Text files to a shard folder, once: the work behind tools.prepare_data and behind training on raw text."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from glob import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parallel.errors import DataError
from pipeline.config.patterns import is_pattern, split_pattern
from pipeline.data.card import Notes
from pipeline.data.discovery import find_texts
from pipeline.data.document_ends import AUTO, Ends
from pipeline.data.held_out import WHOLE, Part
from pipeline.data.once import Named, describe, intact, named, once, same_files
from pipeline.data.readings import first_format
from pipeline.data.records import RecordReader
from pipeline.data.segments import SEGMENT, Segment, segments
from pipeline.data.shard_writer import MAX_SHARD_TOKENS, ShardWriter
from pipeline.data.shards import Manifest, TokenShards, is_prepared, open_shards
from pipeline.data.spelled import Spelled, special_contents
from pipeline.data.tokenizer import TextTokenizer, encode_after, load_tokenizer
from pipeline.data.workers import BATCH_CHARACTERS, in_order, one_thread
from pipeline.reporting.words import counted

Progress = Callable[[int, int, int], None]
"""Called as (bytes of source done, bytes of source in all, tokens written)."""

SOURCE_A_WORKER = 1 << 26
"""Bytes of source that make one more worker process worth its start."""
_LARGE = 1 << 23
"""Characters tokenized at once that are worth a word on the memory they take."""
_MEMORY = 150
"""Bytes of memory a character, measured with English text."""


def _silent(done: int, total: int, tokens: int) -> None:
    pass


# What a worker process tokenizes with; a tokenizer does not travel between processes, its path does.
_worker: tuple[TextTokenizer, Ends] | None = None


def _start_worker(path: Path, ends: Ends) -> None:
    global _worker
    _worker = load_tokenizer(path), ends


Tokens = tuple[NDArray[np.uint32], NDArray[np.int64], int]
"""Ids, lengths of the documents ended, and how many ids at the end are of a document that is not: see
`ShardWriter.add`."""


def _tokenize_in_worker(batch: list[Segment]) -> Tokens:
    assert _worker is not None  # set by the pool's initializer
    return tokenize(batch, *_worker)


def tokenize(batch: list[Segment], tokenizer: TextTokenizer, ends: Ends = AUTO) -> Tokens:
    """Token ids of documents and parts of them, in order.

    Args:
        ends: what each document is given at both ends.

    Returns:
        ids uint32 [tokens]; the length of each document that ends, EOS included, without what came of it in an earlier
        batch, int64 [documents]; the number of ids of a document that a later batch goes on with.
    """
    bos, eos = ends.ids(tokenizer)
    rows, lengths, unfinished = [], [], 0
    for group in _groups(batch):
        ids: list[int] = []
        encoded = encode_after(tokenizer, [(segment.left, segment.text) for segment in group])
        for segment, own in zip(group, encoded, strict=True):
            begin = len(ids)
            if bos is not None and not segment.left:
                ids.append(bos)
            ids += own
            if segment.ends and eos is not None:
                ids.append(eos)
            unfinished += len(ids) - begin
            if segment.ends:
                lengths.append(unfinished)
                unfinished = 0
        rows.append(np.array(ids, dtype=np.uint32))
    return np.concatenate(rows), np.array(lengths, dtype=np.int64), unfinished


def _groups(batch: list[Segment]) -> Iterator[list[Segment]]:
    """What is tokenized in one call: many short documents, and no more than one part of a long one."""
    group: list[Segment] = []
    characters = 0
    for segment in batch:
        if group and characters + len(segment.text) > SEGMENT:
            yield group
            group, characters = [], 0
        group.append(segment)
        characters += len(segment.text)
    yield group


Batches = Iterator[tuple[list[Segment], int]]


def _batches(reader: RecordReader, part: Part, tokenizer: TextTokenizer, spelled: Spelled) -> Batches:
    """Documents of a part, and pieces of them, in batches, with the source bytes read up to the end of each."""
    batch: list[Segment] = []
    characters = 0
    pieces = ((piece.text, piece.ends) for piece in part.of(reader.pieces()))
    for segment in segments(pieces, tokenizer.may_cut):
        if len(segment.text) >= _LARGE:
            print(
                f"warning: {reader.file}: {len(segment.text):,} characters of one document are tokenized at once, as "
                f"{tokenizer.path} allows no cut between them; that takes about "
                f"{len(segment.text) * _MEMORY / (1 << 30):.1f} GiB of memory.",
                file=sys.stderr,
            )
        spelled.add(segment.text, segment.ends, reader.file)
        batch.append(segment)
        characters += len(segment.text)
        if characters >= BATCH_CHARACTERS:
            yield batch, reader.done_bytes
            batch, characters = [], 0
    if batch:
        yield batch, reader.done_bytes


def _tokenized(batches: Batches, tokenizer: TextTokenizer, ends: Ends, workers: int) -> Iterator[tuple[Tokens, int]]:
    """Tokenized batches in the reader's order, whatever the number of worker processes."""
    if workers == 1:
        for batch, done in batches:
            yield tokenize(batch, tokenizer, ends), done
        return
    start = (tokenizer.path, ends)
    yield from in_order(batches, _tokenize_in_worker, workers, _start_worker, start, tokenizer.path)


def _sources(source: Path, text_field: str) -> Named:
    return named(source, [file.path for file in find_texts(source, text_field).files])


def up_to_date(
    source: Path, out: Path, tokenizer: TextTokenizer, text_field: str, ends: Ends = AUTO, part: Part = WHOLE
) -> Manifest | None:
    """The manifest at `out` if it was made from these sources in this way and is intact, else None."""
    manifest = intact(out, tokenizer)
    if manifest is None:
        return None
    made = (manifest.text_field, manifest.ends, manifest.part, manifest.chat)
    alike = made == (text_field, ends.ids(tokenizer), part.name, "")
    return manifest if alike and same_files(_sources(source, text_field), manifest.sources) else None


def prepare(
    source: Path,
    out: Path,
    tokenizer: TextTokenizer,
    text_field: str = "text",
    progress: Progress = _silent,
    workers: int | None = 1,
    max_shard_tokens: int = MAX_SHARD_TOKENS,
    ends: Ends = AUTO,
    part: Part = WHOLE,
) -> Manifest:
    """Tokenize `source` into the shard folder `out`, or leave it as it is if it is up to date.

    Safe to call from several processes at once: one writes, the others wait and reuse.

    Args:
        source: file, folder or pattern of text (see `records`).
        out: folder to write; an older shard folder there is replaced.
        tokenizer: what to tokenize with.
        text_field: key of the text in .jsonl records.
        progress: told after every batch of documents.
        workers: processes that tokenize; the result does not depend on it. None: as many as there is text for, up to
            half of this machine's cores.
        max_shard_tokens: tokens a shard file.
        ends: what every document is given at both ends.
        part: which documents.

    Raises:
        ConfigError: see `Ends.ids`.
        DataError: the text is missing, malformed or empty, or `out` is not ours to replace.
    """
    # Refuse what is bad before waiting for the lock or touching `out`.
    find_texts(source, text_field)
    ends.ids(tokenizer)

    def write(out: Path) -> Manifest:
        reader = RecordReader(source, text_field)
        processes = workers
        if processes is None:
            processes = max(1, min(len(os.sched_getaffinity(0)) // 2, reader.total_bytes // SOURCE_A_WORKER))
        entries = describe(_sources(source, text_field), lambda: progress(0, reader.total_bytes, 0))
        spelled = Spelled(special_contents(tokenizer))
        batches = _batches(reader, part, tokenizer, spelled)
        with one_thread(), ShardWriter(out, tokenizer, max_shard_tokens) as writer:
            for tokens, done in _tokenized(batches, tokenizer, ends, processes):
                writer.add(*tokens)
                progress(done, reader.total_bytes, writer.tokens)
            if not writer.documents and part.share and reader.documents:
                side = "the held-out part" if part.held_out else "the other part"
                raise DataError(
                    f"{source}: of its {counted(reader.documents, 'document')} none falls to {side} with a share of "
                    f"{part.share:g}; change --held-out, or hold files out by hand."
                )
            if not writer.documents:
                raise DataError(f"{source}: every document in it is empty; give it text.")
            reasons = {"it is empty": reader.empty, "the tokenizer makes no token of it": writer.without_tokens}
            notes = Notes(reasons, warnings=spelled.sentences())
            manifest = writer.finish(entries, sum(reasons.values()), text_field, notes=notes, ends=ends, part=part.name)
        progress(reader.total_bytes, reader.total_bytes, manifest.tokens)
        return manifest

    return once(out, lambda found: up_to_date(source, found, tokenizer, text_field, ends, part), write)


def cache_folder(
    path: Path,
    cache_dir: Path,
    tokenizer: TextTokenizer,
    text_field: str,
    fingerprint: str | None = None,
    ends: Ends = AUTO,
) -> Path:
    """Where the shards of raw text at `path` are cached: one folder a source, tokenizer, text field and ends.

    Args:
        fingerprint: taken for the tokenizer's own, as of an earlier release.
    """
    parts = [os.fspath(path.resolve()), fingerprint or tokenizer.fingerprint, text_field]
    if ends.ids(tokenizer) != AUTO.ids(tokenizer):
        parts.append("bos {} eos {}".format(*ends.ids(tokenizer)))
    identity = "\0".join(parts)
    return cache_dir / f"{cache_name(path)}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def cache_name(path: Path) -> str:
    """What the names of cached folders of a source begin with, before a dash and a hash: its own, or its folder's."""
    return (split_pattern(path)[0] if is_pattern(path) else path).resolve().name


def left_out(path: Path, text_field: str) -> tuple[str, ...]:
    """One sentence that names the files at `path` that are not read as text, or none.

    Raises:
        DataError: see `find_texts`.
    """
    return () if is_prepared(path) else find_texts(path, text_field).warnings


def open_text_or_shards(
    path: Path,
    cache_dir: Path,
    tokenizer: TextTokenizer,
    text_field: str = "text",
    progress: Progress = _silent,
    ends: Ends = AUTO,
) -> TokenShards:
    """The token stream of a prepared folder, or of raw text, which is prepared into `cache_dir` the first time.

    Raises:
        ConfigError: see `Ends`.
        DataError: see `prepare`, `open_shards` and `Ends.check`.
    """
    if is_prepared(path):
        shards = open_shards(path, tokenizer)
        ends.check(path, *shards.manifest.ends, bool(shards.manifest.chat))
        return shards
    out = cache_folder(path, cache_dir, tokenizer, text_field, ends=ends)
    if not out.exists() and cache_dir.is_dir() and any(cache_dir.glob(f"{escape(cache_name(path))}-*")):
        # What an earlier release cached is found under the name that it gave.
        earlier = first_format(tokenizer)
        cached = cache_folder(path, cache_dir, tokenizer, text_field, earlier, ends) if earlier is not None else out
        if up_to_date(path, cached, tokenizer, text_field, ends) is not None:
            out = cached
    prepare(path, out, tokenizer, text_field, progress, workers=None, ends=ends)
    return open_shards(out, tokenizer)
