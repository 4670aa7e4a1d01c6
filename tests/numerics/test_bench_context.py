"""tools.bench.context on two CPU processes: every variant agrees with one process and tells what it sent."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from pipeline.model.attention_layout import AttentionSpec, SequenceLayout, head_plan
from pipeline.model.context_plan import halo_bytes
from tests.ranks import run_ranks

LENGTHS, GROUP, HEADS, KV_HEADS, DIM, RANKS = (256, 128), 64, 8, 2, 16, 2
RINGS = tuple(f"full, torch ring, {way} (cpu)" for way in ("alltoall", "allgather"))
OURS = {"full, our all-gather": "full", "S², our halo": "s2"}


def _bench(rank: int, world: int, file: str) -> tuple[int, str]:
    """Exit code and what the rank prints."""
    from tools.bench.context import main

    arguments = ["--group", str(GROUP), "--heads", str(HEADS), "--kv-heads", str(KV_HEADS), "--dim", str(DIM)]
    arguments += ["--repeats", "2", "--json", file, "--lengths", *map(str, LENGTHS)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(arguments)
    return code, out.getvalue()


def test_every_variant_is_right_and_told_with_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    (code, text), (other_code, other_text) = run_ranks(_bench, RANKS, str(file), timeout=200)
    assert (code, other_code, other_text) == (0, 0, "")
    names = (*RINGS, *OURS)
    # Once where its error is told, once in the table a length.
    assert all(text.count(name) == 1 + len(LENGTHS) for name in names) and text.count(": right") == len(names)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(row["length"], row["variant"]) for row in rows] == [(n, name) for n in sorted(LENGTHS) for name in names]
    heads = head_plan(0, HEADS, HEADS, KV_HEADS, "upper_half")
    for row in rows:
        layout, tokens = SequenceLayout.dense(1, row["length"]), row["length"] // RANKS
        spec = AttentionSpec(OURS.get(row["variant"], "full"), GROUP)
        # A ring passes on as much as an all-gather delivers.
        bytes_of_ranks = halo_bytes(layout, spec, heads, RANKS, tokens, DIM, 4)
        assert row["sent_bytes"] == [sent for sent, _ in bytes_of_ranks]
        # Two medians of two noisy runs: the forward alone may even be the slower one.
        assert 0 < row["forward_ms"] < 1e5 and 0 < row["forward_backward_ms"] < 1e5
    for length in LENGTHS:
        rings = [row for row in rows if row["length"] == length and row["variant"] in RINGS]
        assert max(row["forward_backward_speedup"] for row in rings) == 1
        assert max(row["forward_speedup"] for row in rings) == 1
