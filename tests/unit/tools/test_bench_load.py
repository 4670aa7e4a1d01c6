"""The bench of loading counts the bytes that a rank reads, in every way there is here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from parallel.errors import ConfigError
from tests.support.tiny_models import make_tiny
from tools.bench import load as bench


def test_every_way_reads_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(tmp_path, "llama2")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        whole = sum(file.get_tensor(name).nbytes for name in file.keys())
    monkeypatch.setattr(bench, "RANKS", 2)
    monkeypatch.setattr(bench, "RANK", 1)
    monkeypatch.setattr(bench, "measure", lambda way, folder: bench.WAYS[way](folder))
    assert bench.main(["--model", str(tmp_path), "--rounds", "1", "--json", str(tmp_path / "rows")]) == 0
    rows = {row["way"]: row for row in map(json.loads, (tmp_path / "rows").read_text().splitlines())}
    assert len(rows) >= 5
    for way, row in rows.items():
        part = "TP" in way or "zero3" in way
        assert (0.4 * whole < row["GB"] * 1e9 < 0.8 * whole) if part else row["GB"] * 1e9 == whole, way
        assert row["cold s"] > 0 and row["warm GB/s"] == pytest.approx(row["GB"] / row["warm s"])


def test_ways_by_name() -> None:
    assert bench.ways_with(["whole", "TP"]) == ["ours, whole", f"ours, rank {bench.RANK} of TP {bench.RANKS}"]
    with pytest.raises(ConfigError, match="--only: no way here has mapped in its name; there are: ours, whole;"):
        bench.ways_with(["mapped"])
