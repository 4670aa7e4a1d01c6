"""Model folders out: shards with an index and recorded hashes, resumable, never half-written."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from parallel.errors import CheckpointError
from pipeline.hf.companions import COMPANIONS
from pipeline.hf.hashes import HASHES, write_hashes
from pipeline.hf.weight_files import INDEX, SINGLE
from pipeline.reporting.progress import ByteProgress
from pipeline.storage.digest import sha256_of
from pipeline.storage.durable import WITHOUT_LOCKS
from pipeline.storage.json_file import write_json
from pipeline.storage.safetensors import TensorFact, Written, write_safetensors

SHARD_BYTES = 4_000_000_000
FINITE_ROWS = 4096
"""Rows looked at together."""
FINISHED = ".finished.json"
"""Inside an unfinished folder: the job it belongs to and the shards that are done."""
NOTE = "longspan.json"
"""Beside an adapter: what PEFT's files cannot tell."""
REPORT = "verify.json"
"""What `pipeline.export.verify` found, in every export it looked at."""
_OURS = {
    HASHES: {INDEX},
    NOTE: {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "trainable_params.safetensors",
        "trainable_params.bin",
    },
}
"""Mark of an earlier export or import -> files that such a one may hold, beside those that all do."""
_COMMON = {"config.json", REPORT, *COMPANIONS}
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def plan_shards(facts: Mapping[str, TensorFact], max_bytes: int) -> list[list[str]]:
    """Names of each shard: in the given order, as many as fit `max_bytes`; a larger tensor stands alone."""
    shards: list[list[str]] = []
    room = 0
    for name, fact in facts.items():
        if not shards or fact.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= fact.nbytes
    return shards


def write_safetensors_sharded(
    folder: Path,
    facts: Mapping[str, TensorFact],
    read: Callable[[str], torch.Tensor],
    max_shard_bytes: int = SHARD_BYTES,
    progress: ByteProgress | None = None,
) -> list[str]:
    """Write a model's weights as Hugging Face shards with an index (a single file when it fits), and their hashes.

    In a folder of `resumable_folder`, shards that an interrupted run finished are kept when their bytes still match.

    Args:
        facts: announced tensors, in the order shards are filled.
        read: gives a tensor when its turn comes (in no particular order), so that memory holds one at a time.
        progress: told of finished bytes.

    Returns:
        Names of the files written, index included.

    Raises:
        CheckpointError: the disk is too full (found out first), or refused.
    """
    progress = progress or ByteProgress(0, "", enabled=False)
    shards = plan_shards(facts, max_shard_bytes)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    done = _kept(folder)
    todo = [(file, shard) for file, shard in zip(files, shards, strict=True) if file not in done]
    check_space(folder, sum(facts[name].nbytes for _, shard in todo for name in shard))
    for file, shard in zip(files, shards, strict=True):
        if file in done:
            progress.advance(sum(facts[name].nbytes for name in shard), f"{file} kept")
            continue
        wanted = {name: facts[name] for name in shard}
        done[file] = write_safetensors(folder / file, wanted, read, {}, progress.advance)
        progress.say(f"{file} written")
        _remember(folder, done)
    write_hashes(
        folder,
        {file: done[file].sha256 for file in files},
        {name: digest for file in files for name, digest in sorted(done[file].tensors.items())},
    )
    if len(shards) == 1:
        return files
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total = sum(fact.nbytes for fact in facts.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, INDEX]


def _remember(folder: Path, done: Mapping[str, Written]) -> None:
    """Note finished shards, where the folder may be resumed."""
    path = folder / FINISHED
    if path.is_file():
        note = json.loads(path.read_text())
        note["shards"] = {file: vars(written) for file, written in done.items()}
        temporary = path.with_name(path.name + ".tmp")
        write_json(temporary, note)
        temporary.replace(path)


def _kept(folder: Path) -> dict[str, Written]:
    """Shards an interrupted run finished whose bytes still have the recorded hash."""
    path = folder / FINISHED
    if not path.is_file():
        return {}
    kept = {}
    for file, declared in json.loads(path.read_text()).get("shards", {}).items():
        whole = (folder / file).is_file() and (folder / file).stat().st_size == declared["nbytes"]
        if whole and sha256_of(folder / file) == declared["sha256"]:
            kept[file] = Written(**declared)
    return kept


def is_finite(tensor: torch.Tensor) -> bool:
    """No value is infinite or NaN; some rows at a time, as the check makes a mask of its own."""
    return all(bool(block.isfinite().all()) for block in tensor.split(FINITE_ROWS))


def trained_finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A trained tensor as it is about to be written.

    Logits of a few tokens would not meet a single bad row, so the comparison that follows an export cannot find it.

    Raises:
        CheckpointError: it holds an infinity or a NaN.
    """
    if not is_finite(tensor):
        narrow = " (or too large for float16: train from a base imported with --dtype bf16)"
        where = f"after training{narrow if tensor.dtype is torch.float16 else ''}"
        raise CheckpointError(
            f"{name}: holds a value that is not finite {where}; training diverged, so export an earlier checkpoint."
        )
    return tensor


def check_space(folder: Path, need: int) -> None:
    """Refuse to start writing `need` bytes where they do not fit.

    Raises:
        CheckpointError: naming both amounts.
    """
    free = shutil.disk_usage(folder).free
    if need > free:
        raise CheckpointError(
            f"{folder}: needs {need / 2**30:.1f} GiB and the disk has {free / 2**30:.1f}; free space or choose another "
            "output."
        )


@contextmanager
def new_folder(output: Path, force: bool) -> Iterator[Path]:
    """Give a temporary folder beside `output` that becomes `output` when the block succeeds, and vanishes when it
    fails.

    Raises:
        CheckpointError: `output` exists and is not empty (without `force`), or holds anything but an earlier export.
    """
    output = _free(output, force)
    temporary = output.with_name(f".writing-{output.name}-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        # Meanwhile another program, or the user, may have put something there.
        _free(output, force)
        _publish(temporary, output)
    except OSError as error:
        raise _refused(output, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _free(output: Path, force: bool) -> Path:
    """The absolute path, links followed, after checking that nothing but an earlier export of ours is lost there."""
    output = Path(os.path.realpath(output))
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output}: is a file; choose another output folder.")
    held = sorted(output.iterdir()) if output.is_dir() else []
    if not held:
        return output
    if not force:
        raise CheckpointError(f"{output}: is not empty; choose another output folder, or replace it with --force.")
    marks = [mark for mark in _OURS if (output / mark).is_file()]
    if not marks:
        raise CheckpointError(
            f"{output}: is no earlier export or import ({HASHES} or {NOTE} would be in it), so --force will not "
            "replace it; choose another output folder."
        )
    ours = _COMMON.union(marks, *(_OURS[mark] for mark in marks))
    for path in held:
        known = path.name in ours or (HASHES in marks and _WEIGHTS.fullmatch(path.name))
        if path.is_dir() or not known:
            raise CheckpointError(
                f"{path}: is nothing that an export writes, so --force will not delete it; move it away, or choose "
                "another output folder."
            )
    return output


def _publish(temporary: Path, output: Path) -> None:
    """Put a finished folder in place of what was there, which is deleted only when the new one stands."""
    replaced = output.with_name(f".replaced-{output.name}-{os.getpid()}")
    if output.exists():
        output.rename(replaced)
    try:
        temporary.rename(output)
    except BaseException:
        if replaced.exists():
            replaced.rename(output)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _refused(output: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{output}: could not be written ({error}); free space or fix permissions, and rerun.")


@contextmanager
def resumable_folder(output: Path, force: bool, job: Mapping[str, Any]) -> Iterator[Path]:
    """Like `new_folder`, but an interrupted block leaves its finished shards for the same job to go on with.

    The folder is `.writing-<name>` beside `output`, locked while a process writes it. Another job starts afresh.

    Args:
        job: whatever decides the bytes written: source files, dtype, shard size.

    Raises:
        CheckpointError: as `new_folder`; or another process is writing the same output.
    """
    output = _free(output, force)
    temporary = output.with_name(f".writing-{output.name}")
    identity = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
    lock = None
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            lock = None
            raise CheckpointError(f"{output}: another process is writing it; wait for that one to end.") from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
        note = temporary / FINISHED
        same = _same_job(note, identity)
        # Shards only: a tokenizer edited by the interrupted run (a token added) would be edited twice.
        kept = {note.name, *_kept_names(note)} if same else set()
        for path in temporary.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not same:
            write_json(note, {"job": identity, "shards": {}})
        yield temporary
        # Before the note goes: refused now, the finished shards stay for another try.
        _free(output, force)
        note.unlink()
        _publish(temporary, output)
    except OSError as error:
        raise _refused(output, error) from None
    finally:
        # Kept only when there is something to go on with.
        if lock is not None:
            if temporary.is_dir() and not _kept_names(temporary / FINISHED):
                shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


def _same_job(note: Path, identity: str) -> bool:
    try:
        return bool(json.loads(note.read_text())["job"] == identity)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _kept_names(note: Path) -> list[str]:
    try:
        return list(json.loads(note.read_text())["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
