"""Triton's kernels without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

PROGRAM = """
import importlib, json, sys, traceback
module, *calls = sys.argv[1:]
names, told = {module: importlib.import_module(f"tests.numerics.{module}")}, {}
for call in calls:
    try:
        eval(call, names)
        told[call] = ""
    except BaseException:
        told[call] = traceback.format_exc()
print(json.dumps(told))
"""
"""Makes the calls it is given."""


def interpret(call: str) -> None:
    """Run a call into a module of tests.numerics under Triton's interpreter; it must be chosen before all imports."""
    (told,) = interpret_all([call]).values()
    assert not told, told


def interpret_all(calls: Sequence[str]) -> dict[str, str]:
    """As `interpret`, of several calls into one module, all in one process, which imports for longer than most take.

    Returns:
        Call -> what it failed with; empty: nothing.
    """
    pytest.importorskip("triton")  # torch requires it on Linux alone
    (module,) = {call.split(".")[0] for call in calls}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, module, *calls],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    told: dict[str, str] = json.loads(ran.stdout.splitlines()[-1])
    assert list(told) == list(calls)
    return told
