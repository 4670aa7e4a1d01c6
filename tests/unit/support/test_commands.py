"""A forked command does what the same command does that is really started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.commands import ForkedPopen, read_command

TOLD = """
import atexit, os, signal, subprocess, sys, warnings
warnings.warn("warned")
kind, *rest = sys.argv[1:]
atexit.register(lambda: print("at exit", flush=True))
print(kind, rest, os.getcwd(), os.environ.get("OF_OURS"), os.environ.get("HOME"), __name__, sys.argv[0] != "")
print(sys.stdin.read(), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1))
print("to error", file=sys.stderr, flush=True)
if kind == "code": sys.exit(300)
if kind == "text": sys.exit("a sentence")
if kind == "raise": raise ValueError("planted")
if kind == "interrupt": raise KeyboardInterrupt
if kind == "kill": os.kill(os.getpid(), signal.SIGKILL)
if kind == "session": print(os.getsid(0) == os.getpid(), flush=True)
if kind == "child":
    child = subprocess.run([sys.executable, "-u", "-m", "told", "code", "of a child"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    print(child.stdout, child.stderr, child.returncode, os.getppid() != os.getpid())
"""  # noqa: E501


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "told.py").write_text(TOLD)
    return tmp_path


def run(kind: str, folder: Path, start: type, **more: bool) -> tuple[int, str, str]:
    command = [sys.executable, "-W", "ignore", "-m", "told", kind, "a word", "ä"]
    environment = os.environ | {"OF_OURS": "ours"}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(command, cwd=folder, env=environment, text=True, **streams, **more) as process:
        out, errors = process.communicate("typed", timeout=100)
    return process.returncode, out, errors


@pytest.mark.parametrize("kind", ["plain", "code", "text", "raise", "interrupt", "kill", "session", "child"])
def test_as_if_started(kind: str, folder: Path) -> None:
    more = {"start_new_session": True} if kind == "session" else {}
    code, out, errors = run(kind, folder, ForkedPopen, **more)
    started = run(kind, folder, subprocess.Popen, **more)
    assert (code, out) == started[:2]
    lines, expected = errors.splitlines(), started[2].splitlines()
    # The frames of runpy's are others.
    assert lines == expected or (lines[0], lines[-1]) == (expected[0], expected[-1])
    if kind == "plain":
        assert f"plain ['a word', 'ä'] {folder} ours" in out and "typed" in out and out.endswith("at exit\n")


def test_it_is_a_process_of_its_own(folder: Path) -> None:
    (folder / "wait.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(1000)\n")
    words = [sys.executable, "-u", "-m", "wait", f"{folder}/mark"]
    with ForkedPopen(words, cwd=folder, env={"RANK": "7"}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        shown = psutil.Process(process.pid)
        assert [word for word in shown.cmdline() if word] == words and shown.environ() == {"RANK": "7"}
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.send_signal(signal.SIGSTOP)
        until = time.monotonic() + 10
        while shown.status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < until
        process.kill()
        assert process.wait(10) == -signal.SIGKILL and process.poll() == -signal.SIGKILL


def test_what_is_forked() -> None:
    python = sys.executable
    assert read_command([python, "-W", "ignore", "-u", "-m", "a.b", "-m", 3]) == ("a.b", ("-m", "3"), ("ignore",), True)
    for words in ([python, "-c", "1"], [python, "-I", "-m", "a"], [python, "a.py"], ["bash", "-m", "a"], python):
        assert read_command(words) is None
