"""The smallest GPU is read from what nvidia-smi says, and none is no error."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.world.gpu_memory import smallest_gpu


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 81559; echo 24564", 24564 << 20),
        ("echo 143771", 143771 << 20),
        ("echo 'No devices were found'", None),
        ("exit 9", None),
        ("", None),
    ],
)
def test_the_smallest_gpu(script: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert smallest_gpu() == expected
    program.unlink()
    assert smallest_gpu() is None
