"""A shard folder is written once and then reused: by one process of several, while its sources stay the same."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from errno import ENOSPC
from pathlib import Path

from parallel.errors import DataError
from pipeline.config.patterns import is_pattern, split_pattern
from pipeline.data.folders import remove_leftovers, replace_folders
from pipeline.data.shards import Manifest, SourceEntry, is_prepared, open_shards
from pipeline.data.tokenizer import TextTokenizer
from pipeline.storage.digest import sha256_of
from pipeline.storage.durable import WITHOUT_LOCKS

Named = Sequence[tuple[str, Path]]
"""Name in the manifest and path of every source file."""


def named(source: Path, files: Sequence[Path]) -> Named:
    """Source files with their names: relative to the source where that is a folder, or to the folder of a pattern."""
    root = split_pattern(source)[0] if is_pattern(source) else source
    return [(file.name if file == root else file.relative_to(root).as_posix(), file) for file in files]


def describe(files: Named, described: Callable[[], None] = lambda: None) -> tuple[SourceEntry, ...]:
    """What the manifest keeps of the source files.

    Args:
        described: told after each.

    Raises:
        DataError: one cannot be read.
    """
    entries = []
    for name, file in files:
        try:
            # Before the content, so that a file changed meanwhile looks stale next time.
            status = file.stat()
            entries.append(SourceEntry(name, status.st_size, status.st_mtime_ns, sha256_of(file)))
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}); mend or remove it.") from error
        described()
    return tuple(entries)


def same_files(files: Named, entries: Sequence[SourceEntry]) -> bool:
    """Whether the files are those of a manifest; content is read only where the time of change differs."""
    if [name for name, _ in files] != [entry.name for entry in entries]:
        return False
    for (_, file), entry in zip(files, entries, strict=True):
        try:
            status = file.stat()
            if status.st_size != entry.size:
                return False
            if status.st_mtime_ns != entry.mtime_ns and sha256_of(file) != entry.sha256:
                return False
        except OSError:
            return False  # gone or unreadable: preparing anew says so
    return True


def intact(out: Path, tokenizer: TextTokenizer) -> Manifest | None:
    """The manifest at `out` if it was made with this tokenizer and is whole, else None."""
    if not is_prepared(out):
        return None
    try:
        return open_shards(out, tokenizer).manifest
    except DataError:
        return None


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
        hidden = out.parent
        # Of a split's half the folder it will be, not the one beside it that is gone by now, see `together`.
        told = hidden.parent / out.name if hidden.name.startswith(f".{out.name}.writing-") else out
        what = "choose another folder, or make room" if error.errno == ENOSPC else "choose another folder"
        raise DataError(f"{told}: cannot be written ({error.strerror or error}); {what}.") from error


def _refuse_other(out: Path) -> None:
    if out.exists() and not is_prepared(out) and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(
            f"{out}: exists and holds something else than prepared tokens; move it away, or choose another."
        )


def once(out: Path, find: Callable[[Path], Manifest | None], write: Callable[[Path], Manifest]) -> Manifest:
    """What is at `out` already, or what is written there now; of several processes at once one writes.

    Args:
        out: a folder; links are followed, so that the rename at the end of writing stays on one disk.
        find: the manifest of a folder that will do, else None.
        write: writes the folder; an older shard folder there is replaced.

    Raises:
        DataError: `out` holds something else, or cannot be written.
    """
    out = out.resolve()
    if not _writable(out.parent / f".{out.name}.lock"):
        manifest = find(out)
        if manifest is not None:  # somebody else's, and as good as ours
            return manifest
    with _locked(out):
        remove_leftovers(out)
        manifest = find(out)
        if manifest is not None:
            return manifest
        _refuse_other(out)
        return write(out)


@contextmanager
def together(folders: Sequence[Path], fresh: Callable[[], bool]) -> Iterator[Sequence[Path]]:
    """Where to write shard folders that belong together: beside them, and at the end all are replaced, or none.

    Until then the older ones stay, whatever becomes of this process. Of several processes at once one writes.

    Args:
        folders: links are followed.
        fresh: whether they will do as they are; then, and if there is only one, they are the places themselves.

    Raises:
        DataError: one holds something else, or cannot be written.
    """
    if len(folders) > 1 and not fresh():
        real = [folder.resolve() for folder in folders]
        with ExitStack() as stack:
            for folder in real:
                stack.enter_context(_locked(folder))
            remove_leftovers(*real)
            if not fresh():
                places = {}
                for folder in real:
                    _refuse_other(folder)
                    beside = tempfile.TemporaryDirectory(prefix=f".{folder.name}.writing-", dir=folder.parent)
                    places[folder] = Path(stack.enter_context(beside)) / folder.name
                yield list(places.values())
                replace_folders(places)
                return
    yield folders
