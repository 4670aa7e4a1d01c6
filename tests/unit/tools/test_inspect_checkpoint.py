"""The inspector: what it tells, that it sees damage, and what it finds between two checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import LORA, write
from tools.inspect_checkpoint import main

ROOT = Path(__file__).parents[3]


def test_it_tells_what_is_inside_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "checkpoints", 5, layout={"engine": "megatron", "tp": 2})
    assert main([str(tmp_path), "--tensors"]) == 0
    told = capsys.readouterr().out
    for part in (
        "5 (1 updates applied)",
        "engine megatron, tp 2",
        "53 parameters in 3 tensors",
        LORA,
        "[1, 4, 8] 5:12",
    ):
        assert part in told
    assert "whole: 9 files" in told
    assert main([str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "2"
    data = bytearray((folder / "rng-00001.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "rng-00001.safetensors").write_bytes(bytes(data))
    assert main([str(folder)]) == 1
    assert "rng-00001.safetensors: does not match its checksum" in capsys.readouterr().err
    assert main([str(folder), "--no-verify"]) == 0
    assert main([str(tmp_path / "nothing")]) == 2


def test_it_shows_how_two_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, same = write(tmp_path / "a", 5), write(tmp_path / "b", 5)
    other = write(tmp_path / "c", 6, config={"lora": {"rank": 4}})
    assert main([str(one), "--diff", str(same)]) == 0
    assert "no difference" in capsys.readouterr().out
    assert main([str(one), "--diff", str(other)]) == 1
    told = capsys.readouterr().out
    assert "step: 5 | 6" in told and "config.lora.rank: null | 4" in told
    assert f"{LORA} exp_avg: 24 of 24 elements differ, relative 1" in told


def test_it_starts_without_torch() -> None:
    program = "import sys, tools.inspect_checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
