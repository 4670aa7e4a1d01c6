"""The lock of an output folder: a living holder is named, a dead one's lock is taken over."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from parallel.errors import ConfigError
from parallel.health.liveness import machine
from pipeline.training.lock import STALE_S, OutputLock, locked


def held_by(folder: Path, pid: int, where: str, age_s: float = 0.0) -> None:
    """A lock that somebody left."""
    started = psutil.Process(pid).create_time() if psutil.pid_exists(pid) else 1.0
    held = {"host": "node7", "machine": where, "pid": pid, "process_started": started, "since": "yesterday"}
    (folder / ".lock").write_text(json.dumps(held))
    os.utime(folder / ".lock", (time.time() - age_s, time.time() - age_s))


def test_a_second_job_is_refused_and_the_first_leaves_nothing(tmp_path: Path) -> None:
    with OutputLock(tmp_path) as lock:
        assert stat.S_IMODE(lock.path.stat().st_mode) == 0o600
        with pytest.raises(ConfigError, match=rf"in use by another job \(process {os.getpid()} on .* since"):
            OutputLock(tmp_path)
        lock.check()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path, False) as none:
        assert none is None


def test_a_dead_process_on_this_machine_is_known_at_once(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    held_by(tmp_path, child.pid, machine())
    with OutputLock(tmp_path) as lock:
        assert lock.took_over is not None and "no longer runs; taken over" in lock.took_over


def test_an_id_given_to_another_process_is_no_holder(tmp_path: Path) -> None:
    held_by(tmp_path, os.getppid(), machine())
    held = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps(held | {"process_started": held["process_started"] - 500}))
    with OutputLock(tmp_path) as lock:
        assert lock.took_over


def test_another_machine_is_judged_by_the_age_of_its_lock(tmp_path: Path) -> None:
    held_by(tmp_path, 1, "another machine", STALE_S - 20)
    with pytest.raises(ConfigError, match=r"another job \(process 1 on node7, since yesterday\); wait for it, or"):
        OutputLock(tmp_path)
    held_by(tmp_path, 1, "another machine", STALE_S + 20)
    with OutputLock(tmp_path) as lock:
        assert lock.took_over is not None and "not heard of for 1" in lock.took_over


def test_a_lock_lost_to_another_job_is_noticed_and_left_alone(tmp_path: Path) -> None:
    with OutputLock(tmp_path) as lock:
        held_by(tmp_path, 1, "another machine")
        with pytest.raises(ConfigError, match="no longer this job's"):
            lock.check()
    assert (tmp_path / ".lock").exists()
