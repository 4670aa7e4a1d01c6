"""Folders that are not ours alone: an output that machines do not share, a colleague's cache, no flock, overlaps."""

from __future__ import annotations

import errno
import io
import os
import time
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import DataError
from parallel.world.grid import plan_grid
from parallel.world.groups import destroy_groups, make_groups
from parallel.world.rank_env import RankEnv
from pipeline.data import once
from pipeline.data.overlap import shared_text
from pipeline.data.prepare import open_text_or_shards, prepare
from pipeline.training import shared_output
from pipeline.training.shared_output import check_shared
from tests.support.data_helpers import BYTES
from tests.support.ranks import run_ranks


def looks(rank: int, world: int, here: str, there: str) -> list[str]:
    """Ranks on one folder, then on two of the same relative name, then on one that shows files late."""
    groups = make_groups(plan_grid(world, 1, 1, 1), RankEnv.read(), timeout_s=30.0)
    check_shared(groups, Path(here) / "run")
    os.chdir(there if rank == 1 else here)
    shared_output.WAIT_S = 1.0
    found = []
    try:
        check_shared(groups, Path("run"))
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    listed, began = os.listdir, time.monotonic()

    def late(path: Any) -> list[str]:
        if rank == 1 and time.monotonic() - began < 0.5:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return listed(path)

    os.listdir = late  # type: ignore[assignment]
    check_shared(groups, Path(here) / "run")
    destroy_groups()
    return found


def test_ranks_that_write_to_different_disks_are_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there/run").mkdir(parents=True)
    found = run_ranks(looks, 2, str(tmp_path / "here"), str(tmp_path / "there"), timeout=240)
    assert found[0] == found[1] and len(found[0]) == 1, "the same sentence on both"
    assert found[0][0].startswith("ConfigError: output: run is not one folder for all ranks: what rank 0 on ")
    assert "rank 1 on" in found[0][0] and found[0][0].endswith("by the same path.")
    assert os.listdir(tmp_path / "here/run") == [], "and no file is left behind"


def text(folder: Path, name: str = "a.txt", seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(" ".join(str((seed + 1) * n * n % 9973) for n in range(600)))
    return folder


def test_a_colleagues_cache_that_is_up_to_date_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = text(tmp_path / "text"), tmp_path / "cache"
    mine = open_text_or_shards(source, cache, BYTES).read(0, 500)
    (lock,) = cache.glob(".*.lock")
    lock.unlink()
    opened = io.open

    def read_only(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if str(file).startswith(str(cache)) and set(mode) & set("wax+"):
            raise OSError(errno.EROFS, "Read-only file system", str(file))
        return opened(file, mode, *args, **kwargs)

    monkeypatch.setattr(io, "open", read_only)  # what Path.open calls
    assert (open_text_or_shards(source, cache, BYTES).read(0, 500) == mine).all()
    text(source, "b.txt", 1)  # and one that is not up to date is refused, as it cannot be made anew
    with pytest.raises(DataError, match="cannot be written .Read-only file system"):
        open_text_or_shards(source, cache, BYTES)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    source = text(tmp_path / "text")
    monkeypatch.setattr(once.fcntl, "flock", refuse)
    assert prepare(source, tmp_path / "out", BYTES).documents == 1


def test_evaluation_text_that_was_trained_on(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    train, other = text(tmp_path / "train"), text(tmp_path / "other", seed=5)
    copy = text(tmp_path / "copy", "another name.txt")
    text(copy, "new.txt", seed=7)
    inside = tmp_path / "inside.txt"
    words = (train / "a.txt").read_text()
    inside.write_text("Another beginning. " + words[700:2400])
    quoting = tmp_path / "quoting.txt"
    quoting.write_text((other / "a.txt").read_text() + words[700:780])
    shards = {path: open_text_or_shards(path, cache, BYTES) for path in (train, other, copy, inside, quoting)}

    def told(path: Path) -> str:
        return shared_text(shards[train], shards[path])

    assert told(other) == ""
    assert told(train).startswith("eval.path: holds the very tokens of data.path")
    assert "1 of its 2 files is among the training text by content (another name.txt)" in told(copy)
    assert "of 16 passages of 64 tokens" in told(inside)
    assert told(quoting) == "", "a quotation is no leak"
