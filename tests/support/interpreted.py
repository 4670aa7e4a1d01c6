"""Triton's kernels without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def interpret(call: str) -> None:
    """Run a call into a module of tests.numerics under Triton's interpreter; it must be chosen before all imports."""
    pytest.importorskip("triton")  # torch requires it on Linux alone
    module = call.split(".")[0]
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"from tests.numerics import {module}; {call}"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
