"""The bench of data measures what it says: whole figures, of work that was done."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.chat_templates import PUBLISHED
from tests.support.tiny_models import write_tokenizer
from tools.bench import data as bench


def test_figures_of_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "SAMPLES", 3000)
    monkeypatch.setattr(bench, "SHARD_TOKENS", (20_000, 10_000))
    for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))  # put back afterwards
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(PUBLISHED["SmolLM2"])
    (tmp_path / "text.txt").write_text("Where does the whale swim? " * 400)
    call = ["--tokenizer", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--megabytes", "0.02"]
    assert bench.main([*call, "--sequence", "64", "--json", str(tmp_path / "rows")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    compared = [row for row in rows if "the library's" in row]
    assert [row["what"] for row in compared] == [*bench.KINDS, "conversations"]
    for row in compared:
        ratios = [row[name] for name in ("least", "of its pace by processor time", "greatest")]
        assert row["M characters/s"] > 0 and ratios[0] > 0 and len(set(ratios)) == 1, "of one round"
    assert [row["M characters"] for row in compared[:3]] == [0.02] * 3 and compared[3]["M characters"] > 0.02
    loaded = [row for row in rows if "M tokens/s" in row]
    assert [row["what"] for row in loaded][:2] == ["text", "text, documents masked"] and len(loaded) == 4
    bound = bench.H100_FLOPS / (4 * bench.PARAMETERS_7B) / 1e6
    for row in loaded:
        assert row["times an H100 at 7B and its full FLOP/s"] * bound == pytest.approx(row["M tokens/s"])
    assert [row["what"] for row in rows if "MiB" in row][-1] == "3,000 samples"
    assert rows[-1]["what"].startswith("at sample 10,000,000 of ") and rows[-1]["seconds"] > 0
