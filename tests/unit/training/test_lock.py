"""The lock of an output folder: a living holder is named, a dead one's lock is taken over."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from parallel.errors import ConfigError
from parallel.health.liveness import machine
from pipeline.training import lock as lock_module
from pipeline.training.lock import OutputLock, locked, started_ticks


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same waits, sixty times as fast."""
    for name, seconds in (("BEAT_S", 0.25), ("STALE_S", 2.0), ("WATCH_S", 0.6), ("POLL_S", 0.05)):
        monkeypatch.setattr(lock_module, name, seconds)


def held_by(folder: Path, pid: int, where: str, age_s: float = 0.0) -> None:
    """A lock that somebody left."""
    started = started_ticks(pid) if psutil.pid_exists(pid) else 1
    held = {"host": "node7", "machine": where, "pid": pid, "started_ticks": started, "since": "yesterday"}
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
    (tmp_path / ".lock").write_text(json.dumps(held | {"started_ticks": held["started_ticks"] - 500}))
    with OutputLock(tmp_path) as lock:
        assert lock.took_over


def test_ticks_are_those_the_kernel_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against `ps`, which reckons from them and the boot's time how long a process has run."""

    def uptime() -> float:
        return float(Path("/proc/uptime").read_text().split()[0])

    with subprocess.Popen(["sleep", "300"]) as child:
        time.sleep(0.2)  # ps reckons with unsigned numbers: a process of this very tick may be 2^32 s old
        before = uptime()
        shown = subprocess.run(["ps", "-o", "etimes=", "-p", str(child.pid)], capture_output=True, text=True)
        after = uptime()
        started = started_ticks(child.pid) / os.sysconf("SC_CLK_TCK")
        child.kill()
    # On a busy machine time passes while `ps` runs.
    assert before - started - 2 < int(shown.stdout) < after - started + 2
    with pytest.raises(OSError):
        started_ticks(child.pid)


def test_a_clock_that_is_set_does_not_end_a_living_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reckons every process' wall-clock start from its boot time, which moves when the clock is set."""
    with OutputLock(tmp_path):
        began = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: began(process) + 3600)
        boot = psutil._pslinux.boot_time
        monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot() + 3600)
        with pytest.raises(ConfigError, match=r"in use by another job \(process"):
            OutputLock(tmp_path)


def test_a_killed_container_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_by(tmp_path, 1, "another machine", 0.5)
    began = time.monotonic()
    with OutputLock(tmp_path) as lock:
        assert 1.2 < time.monotonic() - began < 10, "what is left of STALE_S"
        assert lock.took_over is not None and "process 1 on node7, since yesterday, which did not" in lock.took_over
        lock.check()
    assert "in use by process 1 on node7, since yesterday, not heard of for" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".lock").write_text("{")
    with OutputLock(tmp_path) as lock:
        assert lock.took_over is not None and "an unreadable holder" in lock.took_over


@pytest.mark.parametrize("age_s", [0.0, 7200.0], ids=["young", "older than a clock that was set tells"])
def test_a_living_holder_elsewhere_is_found_by_its_beat(tmp_path: Path, age_s: float) -> None:
    held_by(tmp_path, 1, "another machine", age_s)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.25):
            os.utime(tmp_path / ".lock")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match=r"in use by another job \(process 1 on node7, since yesterday\); wait"):
            OutputLock(tmp_path)
    finally:
        ended.set()
        thread.join()
    held = json.loads((tmp_path / ".lock").read_text())
    assert held["host"] == "node7", "nothing of it was touched"


def test_a_holder_that_leaves_meanwhile_is_no_loss(tmp_path: Path) -> None:
    held_by(tmp_path, 1, "another machine")
    threading.Timer(0.4, (tmp_path / ".lock").unlink).start()
    with OutputLock(tmp_path) as lock:
        assert lock.took_over is None


def test_a_lock_lost_to_another_job_is_noticed_and_left_alone(tmp_path: Path) -> None:
    with OutputLock(tmp_path) as lock:
        held_by(tmp_path, 1, "another machine")
        with pytest.raises(ConfigError, match="no longer this job's"):
            lock.check()
    assert (tmp_path / ".lock").exists()
