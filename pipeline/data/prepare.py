"""Text files to a shard folder, once: the work behind tools.prepare_data and behind training on raw text."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parallel.errors import DataError
from pipeline.data.records import RecordReader, find_files
from pipeline.data.shards import (
    MAX_SHARD_TOKENS,
    Manifest,
    ShardWriter,
    SourceEntry,
    TokenShards,
    is_prepared,
    open_shards,
    remove_leftovers,
    sha256_of,
)
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.storage.durable import WITHOUT_LOCKS

Progress = Callable[[int, int, int], None]
"""Called as (bytes of source done, bytes of source in all, tokens written)."""

SOURCE_A_WORKER = 1 << 26
"""Bytes of source that make one more worker process worth its start."""
_BATCH_CHARACTERS = 1 << 20
"""Short documents are sent to a worker process in batches of about so much text."""


def _silent(done: int, total: int, tokens: int) -> None:
    pass


# The tokenizer of a worker process; a tokenizer does not travel between processes, its path does.
_worker_tokenizer: TextTokenizer | None = None


def _start_worker(path: Path) -> None:
    global _worker_tokenizer
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _worker_tokenizer = load_tokenizer(path)


def _leave_with_parent() -> None:
    """A parent that is killed cannot end its workers, and their queue, of which they hold both ends, never closes."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker"
    parent.join()
    os._exit(1)


def _tokenize_in_worker(texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    assert _worker_tokenizer is not None  # set by the pool's initializer
    return tokenize(texts, _worker_tokenizer)


def tokenize(texts: list[str], tokenizer: TextTokenizer) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Token ids of documents, each ended by EOS.

    Returns:
        ids uint32 [tokens] and the length of each document, EOS included, int64 [documents].
    """
    rows = [np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=np.uint32) for text in texts]
    return np.concatenate(rows), np.array([len(row) for row in rows], dtype=np.int64)


def _batches(reader: RecordReader) -> Iterator[tuple[list[str], int]]:
    """Texts in batches, with the source bytes read up to the end of each."""
    texts: list[str] = []
    characters = 0
    for document in reader:
        texts.append(document.text)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield texts, reader.done_bytes
            texts, characters = [], 0
    if texts:
        yield texts, reader.done_bytes


def _tokenized(
    reader: RecordReader, tokenizer: TextTokenizer, workers: int
) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.int64], int]]:
    """Tokenized batches in the reader's order, whatever the number of worker processes."""
    if workers == 1:
        for batch, done in _batches(reader):
            yield *tokenize(batch, tokenizer), done
        return
    # spawn: forking a process that runs tokenizer threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.path,)) as pool:
        waiting: deque[tuple[Future[tuple[NDArray[np.uint32], NDArray[np.int64]]], int]] = deque()
        try:
            ends: Iterator[tuple[list[str] | None, int]] = chain(_batches(reader), [(None, 0)])
            for texts, done in ends:
                if texts is not None:
                    waiting.append((pool.submit(_tokenize_in_worker, texts), done))
                # A bounded queue: a corpus must not pile up in memory ahead of the workers.
                while waiting and (texts is None or len(waiting) > 2 * workers):
                    future, bytes_done = waiting.popleft()
                    yield *future.result(), bytes_done
        except BrokenProcessPool as error:
            raise DataError(
                f"{tokenizer.path}: a tokenizing process died, most often for want of memory; use fewer --workers."
            ) from error
        finally:
            for future, _ in waiting:
                future.cancel()


def _sources(source: Path) -> list[tuple[str, Path]]:
    """Name in the manifest and path of every source file."""
    return [(file.name if file == source else file.relative_to(source).as_posix(), file) for file in find_files(source)]


def _describe(source: Path, described: Callable[[], None]) -> tuple[SourceEntry, ...]:
    entries = []
    for name, file in _sources(source):
        try:
            # Before the content, so that a file changed meanwhile looks stale next time.
            status = file.stat()
            entries.append(SourceEntry(name, status.st_size, status.st_mtime_ns, sha256_of(file)))
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}); mend or remove it.") from error
        described()
    return tuple(entries)


def _same_sources(source: Path, entries: tuple[SourceEntry, ...]) -> bool:
    """Whether the files are those of the manifest; content is read only where the time of change differs."""
    found = _sources(source)
    if [name for name, _ in found] != [entry.name for entry in entries]:
        return False
    for (_, file), entry in zip(found, entries, strict=True):
        try:
            status = file.stat()
            if status.st_size != entry.size:
                return False
            if status.st_mtime_ns != entry.mtime_ns and sha256_of(file) != entry.sha256:
                return False
        except OSError:
            return False  # gone or unreadable: preparing anew says so
    return True


def up_to_date(source: Path, out: Path, tokenizer: TextTokenizer, text_field: str) -> Manifest | None:
    """The manifest at `out` if it was made from these sources with this tokenizer and is intact, else None."""
    if not is_prepared(out):
        return None
    try:
        manifest = open_shards(out, tokenizer).manifest
    except DataError:
        return None
    fresh = manifest.text_field == text_field and _same_sources(source, manifest.sources)
    return manifest if fresh else None


def _writable(lock: Path) -> bool:
    """Whether this user can take the lock; False where only its folder is missing."""
    try:
        with lock.open("a"):
            return True
    except OSError:
        return False


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of `out` against other processes; the kernel drops it if this one dies."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with (out.parent / f".{out.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                # Two that write at once then both do the work, each in a folder of its own.
                if error.errno not in WITHOUT_LOCKS:
                    raise
            yield
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error}); choose another folder.") from error


def prepare(
    source: Path,
    out: Path,
    tokenizer: TextTokenizer,
    text_field: str = "text",
    progress: Progress = _silent,
    workers: int | None = 1,
    max_shard_tokens: int = MAX_SHARD_TOKENS,
) -> Manifest:
    """Tokenize `source` into the shard folder `out`, or leave it as it is if it is up to date.

    Safe to call from several processes at once: one writes, the others wait and reuse.

    Args:
        source: file or folder of text (see `records`).
        out: folder to write; an older shard folder there is replaced.
        tokenizer: what to tokenize with.
        text_field: key of the text in .jsonl records.
        progress: told after every batch of documents.
        workers: processes that tokenize; the result does not depend on it. None: as many as there is text for, up to
            half of this machine's cores.
        max_shard_tokens: tokens a shard file.

    Raises:
        DataError: the text is missing, malformed or empty, or `out` is not ours to replace.
    """
    find_files(source)  # refuse a bad source before waiting for the lock or touching `out`
    out = out.resolve()  # through a link, so that the rename at the end stays on one disk
    if not _writable(out.parent / f".{out.name}.lock"):
        manifest = up_to_date(source, out, tokenizer, text_field)
        if manifest is not None:  # somebody else's, and as good as ours
            return manifest
    with _locked(out):
        remove_leftovers(out)
        manifest = up_to_date(source, out, tokenizer, text_field)
        if manifest is not None:
            return manifest
        if out.exists() and not is_prepared(out) and not (out.is_dir() and not any(out.iterdir())):
            raise DataError(f"{out}: exists and holds something else than prepared tokens; choose another folder.")
        reader = RecordReader(source, text_field)
        if workers is None:
            workers = max(1, min(len(os.sched_getaffinity(0)) // 2, reader.total_bytes // SOURCE_A_WORKER))
        entries = _describe(source, lambda: progress(0, reader.total_bytes, 0))
        with ShardWriter(out, tokenizer, max_shard_tokens) as writer:
            for tokens, lengths, done in _tokenized(reader, tokenizer, workers):
                writer.add(tokens, lengths)
                progress(done, reader.total_bytes, writer.tokens)
            if not writer.documents:
                raise DataError(f"{source}: every document in it is empty; give it text.")
            manifest = writer.finish(entries, reader.empty, text_field)
        progress(reader.total_bytes, reader.total_bytes, manifest.tokens)
        return manifest


def cache_folder(path: Path, cache_dir: Path, tokenizer: TextTokenizer, text_field: str) -> Path:
    """Where the shards of raw text at `path` are cached: one folder a source, tokenizer and text field."""
    identity = "\0".join((os.fspath(path.resolve()), tokenizer.fingerprint, text_field))
    return cache_dir / f"{path.resolve().name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def open_text_or_shards(
    path: Path, cache_dir: Path, tokenizer: TextTokenizer, text_field: str = "text", progress: Progress = _silent
) -> TokenShards:
    """The token stream of a prepared folder, or of raw text, which is prepared into `cache_dir` the first time.

    Raises:
        DataError: see `prepare` and `open_shards`.
    """
    if is_prepared(path):
        return open_shards(path, tokenizer)
    out = cache_folder(path, cache_dir, tokenizer, text_field)
    prepare(path, out, tokenizer, text_field, progress, workers=None)
    return open_shards(out, tokenizer)
