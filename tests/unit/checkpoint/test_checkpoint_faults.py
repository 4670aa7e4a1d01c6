"""Faults at every system call of a save and in every file of a checkpoint: what is resumed is whole, and told.

A process is ended (in a forked child, as SIGKILL would), the power fails (what was not synced is lost), or the disk
refuses, at the first, second, ... call that changes the disk. Afterwards the newest whole checkpoint must be found and
be right to the bit, and the next save must succeed over whatever was left.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.choose import choose
from pipeline.storage import durable
from tests.support.checkpoints import holds, write

CRASHED = 9
injected: dict[str, int] = {}


@pytest.fixture(scope="module", autouse=True)
def _told() -> Iterator[None]:
    yield
    print(f"\nfaults injected: {sum(injected.values())} ({injected})")


class FaultyOs:
    """The module `os`, with a fault at the n-th call that changes the disk."""

    def __init__(self, at: int, fault: Callable[[FaultyOs, str, tuple[Any, ...]], Any]) -> None:
        self.at, self.fault, self.calls = at, fault, 0
        self.names: dict[int, str] = {}
        self.unsynced: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in ("open", "write", "fsync", "mkdir", "rename"):
            return real

        def call(*args: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args)
            self.calls += 1
            if self.calls == self.at:
                return self.fault(self, name, args)
            return self.note(name, args, real(*args))

        return call

    def note(self, name: str, args: tuple[Any, ...], result: Any) -> Any:
        """Remember what would be lost with the power."""
        if name == "open":
            self.names[result] = str(args[0])
            self.unsynced.add(str(args[0]))
        elif name == "fsync" and args[0] in self.names:
            self.unsynced.discard(self.names[args[0]])
        return result


def crash_before(faulty: FaultyOs, name: str, args: tuple[Any, ...]) -> None:
    os._exit(CRASHED)


def crash_within(faulty: FaultyOs, name: str, args: tuple[Any, ...]) -> None:
    if name == "write":
        os.write(args[0], args[1][: len(args[1]) // 2])
    os._exit(CRASHED)


def crash_after(faulty: FaultyOs, name: str, args: tuple[Any, ...]) -> None:
    try:
        getattr(os, name)(*args)
    finally:
        os._exit(CRASHED)


def power_loss(faulty: FaultyOs, name: str, args: tuple[Any, ...]) -> None:
    for path in faulty.unsynced:
        if os.path.exists(path):
            os.truncate(path, os.path.getsize(path) // 2)
    os._exit(CRASHED)


def disk_full(faulty: FaultyOs, name: str, args: tuple[Any, ...]) -> None:
    if name == "write":
        os.write(args[0], args[1][: len(args[1]) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(faulty: FaultyOs, name: str, args: tuple[Any, ...]) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))


def calls_of_a_save(folder: Path) -> int:
    counter = FaultyOs(-1, crash_before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "os", counter)
        write(folder, 2)
    return counter.calls


def whole_after(folder: Path, *allowed: int) -> int:
    """The step resumed from, which is right to the bit and has a reason; and the next save works."""
    choice = choose(folder)
    assert choice is not None and choice.step in allowed and choice.reason
    assert holds(choice.folder, choice.step)
    write(folder, 3)
    after = choose(folder)
    assert after is not None and after.step == 3 and not after.warnings and holds(after.folder, 3)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []
    return choice.step


def count(kind: str) -> None:
    injected[kind] = injected.get(kind, 0) + 1


@pytest.mark.parametrize("fault", [crash_before, crash_within, crash_after, power_loss])
def test_a_process_ended_at_any_call(tmp_path: Path, fault: Callable[..., Any]) -> None:
    ready = tmp_path / "ready"
    write(ready, 1)
    total = calls_of_a_save(shutil.copytree(ready, tmp_path / "counted"))
    assert total > 60
    found = []
    for at in range(1, total + 1):
        folder = shutil.copytree(ready, tmp_path / f"at-{at}")
        child = os.fork()
        if not child:
            try:
                durable.os = FaultyOs(at, fault)  # type: ignore[assignment]
                write(folder, 2)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == CRASHED, at
        found.append(whole_after(folder, 1, 2))
        count(fault.__name__)
        shutil.rmtree(folder)
    assert found == sorted(found) and set(found) == {1, 2}, "old until one moment, new from then on"


@pytest.mark.parametrize("fault", [disk_full, read_only])
def test_a_disk_that_refuses_at_any_call(tmp_path: Path, fault: Callable[..., Any]) -> None:
    ready = tmp_path / "ready"
    write(ready, 1)
    total = calls_of_a_save(shutil.copytree(ready, tmp_path / "counted"))
    for at in range(1, total + 1):
        folder = shutil.copytree(ready, tmp_path / f"at-{at}")
        refused = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(durable, "os", FaultyOs(at, fault))
            try:
                write(folder, 2)
            except OSError:
                refused = True
        step = whole_after(folder, 1, 2)
        assert refused or step == 2, "only an old checkpoint that stays is no failure"
        count(fault.__name__)
        shutil.rmtree(folder)


@pytest.mark.parametrize("limit", [0, 50, 200, 700])
def test_a_real_limit_on_file_size(tmp_path: Path, limit: int) -> None:
    write(tmp_path, 1)
    child = os.fork()
    if not child:
        code = 0
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            write(tmp_path, 2)
        except OSError as error:
            code = error.errno or 1
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == errno.EFBIG
    assert whole_after(tmp_path, 1) == 1
    count("file size limit")


def flip(at: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[min(int(at * len(data)), len(data) - 1)] ^= 1
        path.write_bytes(bytes(data))

    return damage


def cut(keep: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, keep(path.stat().st_size))


def linked(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "first byte": flip(0.0),
    "early byte": flip(0.1),
    "middle byte": flip(0.5),
    "late byte": flip(0.9),
    "last byte": flip(1.0),
    "empty": cut(lambda size: 0),
    "half": cut(lambda size: size // 2),
    "one byte short": cut(lambda size: size - 1),
    "one byte more": cut(lambda size: size + 1),
    "gone": Path.unlink,
    "a link": linked,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_to_any_file_falls_back_and_says_so(tmp_path: Path, how: str) -> None:
    ready = tmp_path / "ready"
    write(ready, 1)
    names = sorted(path.name for path in write(ready, 2).iterdir())
    assert len(names) == 11
    for name in names:
        folder = shutil.copytree(ready, tmp_path / name / "run")
        DAMAGE[how](folder / "step-000002" / name)
        choice = choose(folder)
        assert choice is not None and choice.step == 1 and holds(choice.folder, 1)
        assert choice.reason.startswith("the newest whole one")
        assert name in choice.warnings[0] and str(folder / "step-000002") in choice.warnings[0]
        if "byte" in how and "safetensors" in name:
            assert "sha256" in choice.warnings[0]
        count(f"damage: {how}")


@pytest.mark.parametrize("text", ["", "step-000001\n", "step-000099\n", "../../etc\n", None])
def test_a_wrong_pointer_misleads_nobody(tmp_path: Path, text: str | None) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "latest").unlink()
    if text is not None:
        (tmp_path / "latest").write_text(text)
    choice = choose(tmp_path)
    assert choice is not None and choice.step == 2 and choice.warnings[0].startswith(f"{tmp_path / 'latest'}: ")
    count("pointer")


def test_enough_faults_were_injected() -> None:
    """Runs last in this file."""
    assert sum(injected.values()) >= 200
