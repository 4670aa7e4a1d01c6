"""Stacks and collectives of this process, which has a group of its own; what a recorder's JSON says."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from parallel.health import stacks
from parallel.health.stacks import StackWriter, pending, with_stacks
from parallel.health.verdict import Verdict


def entry(name: str, retired: bool, number: int, group: list[str], p2p: bool = False) -> dict[str, object]:
    """As torch 2.11 writes it."""
    return {
        "profiling_name": name,
        "retired": retired,
        "is_p2p": p2p,
        "collective_seq_id": number,
        "p2p_seq_id": number + 100,
        "process_group": group,
    }


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([], ""),
        ([entry("nccl:all_reduce", True, 1, ["0", "default_pg"])], ""),
        (
            [
                entry("nccl:all_reduce", True, 1, ["0", "default_pg"]),
                entry("nccl:all_gather", False, 2, ["3", "tp"]),
                entry("nccl:broadcast", False, 3, ["0", "default_pg"]),
            ],
            "nccl:all_gather (number 2 of process group 3 tp)",
        ),
        ([entry("nccl:recv 0<-1", False, 4, ["5", ""], p2p=True)], "nccl:recv 0<-1 (number 104 of process group 5)"),
    ],
)
def test_pending(entries: list[dict[str, object]], said: str) -> None:
    assert pending(json.dumps({"version": "2.10", "entries": entries})) == said


def test_every_thread_is_written(tmp_path: Path) -> None:
    over = threading.Event()

    def stands_here() -> None:
        over.wait(60)

    thread = threading.Thread(target=stands_here)
    thread.start()
    try:
        told = StackWriter(tmp_path / "run/hang", 3).write()
    finally:
        over.set()
        thread.join()
    text = (tmp_path / "run/hang/rank-3.txt").read_text()
    assert " in stands_here\n" in text and " in test_every_thread_is_written\n" in text
    assert told.endswith(f"the Python stacks and last collectives of every rank are in {tmp_path / 'run/hang'}")


def spy(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A py-spy on PATH, before any other."""
    (folder / "bin").mkdir()
    (folder / "bin/py-spy").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin/py-spy").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def test_py_spy_writes_native_stacks_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy(tmp_path, 'echo "called $*"', monkeypatch)
    assert str(tmp_path / "hang") in StackWriter(tmp_path / "hang", 2).write()
    assert (tmp_path / "hang/rank-2-native.txt").read_text() == f"called dump --native --pid {os.getpid()}\n"
    assert " in test_py_spy_writes" in (tmp_path / "hang/rank-2.txt").read_text(), "faulthandler's too"


def test_a_py_spy_that_cannot_or_hangs_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy(tmp_path, 'echo nothing; echo "Permission denied" >&2; exit 1', monkeypatch)
    StackWriter(tmp_path / "hang", 0).write()
    assert (tmp_path / "hang/rank-0-native.txt").read_text() == "Permission denied\n"
    (tmp_path / "bin/py-spy").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(stacks, "NATIVE_S", 0.5)
    began = time.monotonic()
    assert str(tmp_path / "hang") in StackWriter(tmp_path / "hang", 1).write()
    assert time.monotonic() - began < 20
    assert "timed out" in (tmp_path / "hang/rank-1-native.txt").read_text()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert StackWriter(tmp_path / "without", 0).write()
    assert not (tmp_path / "without/rank-0-native.txt").exists() and (tmp_path / "without/rank-0.txt").exists()


def test_py_spy_itself(tmp_path: Path) -> None:
    if shutil.which("py-spy") is None:
        pytest.skip("py-spy is not installed: pip install 'longspan[hang]'")
    over = threading.Event()
    thread = threading.Thread(target=over.wait, args=(120,), name="stands here")
    thread.start()
    try:
        StackWriter(tmp_path, 0).write()
    finally:
        over.set()
        thread.join()
    text = (tmp_path / "rank-0-native.txt").read_text()
    assert f"Process {os.getpid()}:" in text and '"stands here"' in text and "test_py_spy_itself" in text
    assert re.search(r" \(.*(libc|libpthread|ld-linux)\S*\.so", text), "frames of compiled code"


def test_a_folder_that_cannot_be_made_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    verdict = Verdict(1, "rank 1 hangs")
    assert with_stacks(verdict, StackWriter(tmp_path / "file/hang", 0)) == verdict


@pytest.mark.parametrize("verdict", [Verdict(0, "The text is missing.", 2), Verdict(0, "bug", 1, "Traceback ...")])
def test_who_has_told_why_needs_no_stacks(verdict: Verdict, tmp_path: Path) -> None:
    assert with_stacks(verdict, StackWriter(tmp_path / "hang", 0)) == verdict and not (tmp_path / "hang").exists()
