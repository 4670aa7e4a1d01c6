"""One folder for the ranks of a job, whoever started each of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.errors import ConfigError
from parallel.world.rank_env import RankEnv
from tools.support import scratch as module
from tools.support.scratch import READY, WRITER, scratch, written_once

WORK = """
import time
from pathlib import Path
from parallel.world.rank_env import RankEnv
from tools.support import scratch as module

module.PATIENCE_S = 60.0
env = RankEnv.read()
with module.scratch(env, "test") as folder:
    def work(write):
        if write:
            time.sleep(0.5)
            (folder / "made").write_text("stand-in")
        return (folder / "made").read_text()
    print(folder, module.written_once(env, folder, work), flush=True)
    time.sleep(2 * (env.local_rank == 0))
"""


def start(rank: int, temporary: Path, **variables: str) -> subprocess.Popen[str]:
    """A rank under a shell of its own, as behind a script that binds cores."""
    ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_PORT": "1234"}
    environment = {**os.environ, **ranks, "TMPDIR": str(temporary), "PYTHONPATH": os.getcwd(), **variables}
    command = [sys.executable, "-c", WORK]
    shell = ["bash", "-c", '"$@"; exit $?', "wrapper", *command]
    return subprocess.Popen(shell, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_wrapper_a_rank(tmp_path: Path) -> None:
    told = [rank.communicate(timeout=90)[0] for rank in [start(rank, tmp_path) for rank in (1, 0)]]
    assert told[0] == told[1] and told[0].endswith(" stand-in\n")
    assert list(tmp_path.iterdir()) == [], "removed in the end"


ENV = RankEnv(1, 2, 1, launched=True, master_port=1234)


def refuse(write: bool) -> None:
    raise AssertionError("it wrote or read")


def test_jobs_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = set()
    for env in (ENV, replace(ENV, rank=0, local_rank=0), replace(ENV, rank=9, world_size=16)):
        monkeypatch.setattr(module, "_numbers", iter(range(9)))
        with scratch(env, "x") as folder:
            found.add(folder)
    assert len(found) == 1, "of one path on every rank and machine"
    for change in ({"master_port": 1235}, {"master_host": "other"}, {"attempt": 1}, {"job": "7"}):
        monkeypatch.setattr(module, "_numbers", iter(range(9)))
        with scratch(replace(ENV, **change), "x") as folder:
            found.add(folder)
    assert len(found) == 5


def test_what_a_killed_job_left_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    for mark in (READY, WRITER):
        (tmp_path / mark).write_text(str(gone.pid))
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    told = "the first rank of this machine (LOCAL_RANK 0) has written no stand-ins for 0 s; rank 1 has LOCAL_RANK 1."
    with pytest.raises(ConfigError, match=re.escape(told)):
        written_once(ENV, tmp_path, refuse)
    made: Callable[[bool], bool] = lambda write: write  # noqa: E731
    assert written_once(replace(ENV, rank=0, local_rank=0), tmp_path, made) is True
    assert written_once(ENV, tmp_path, made) is False
    with pytest.raises(ConfigError, match=f"process {os.getpid()} writes there already; two ranks of this machine"):
        written_once(replace(ENV, rank=1, local_rank=0), tmp_path, refuse)
