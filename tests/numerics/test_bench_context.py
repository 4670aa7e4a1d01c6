"""tools.bench.context on two CPU processes: every variant agrees with one process and tells what it sent."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.model.attention.backends import select_backend
from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout, head_plan
from tests.support.halos import halo_bytes
from tests.support.ranks import run_ranks
from tools.bench.torch_ring import refuses

LENGTHS, GROUP, HEADS, KV_HEADS, DIM, RANKS = (256, 128), 64, 8, 2, 16, 2
RINGS = tuple(f"full, torch ring, {way} (cpu)" for way in ("alltoall", "allgather"))
BALANCED = "full, our all-gather, balanced"
OURS = {"full, our all-gather": "full", BALANCED: "full", "S², our halo": "s2"}


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
    # Once where its error is told, once in the table a length; one name begins as another does.
    assert all(text.count(name) == (1 + len(LENGTHS)) * (1 + (f"{name}, balanced" in OURS)) for name in names)
    assert text.count(": right") == len(names)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(row["length"], row["variant"]) for row in rows] == [(n, name) for n in sorted(LENGTHS) for name in names]
    heads = head_plan(0, HEADS, HEADS, KV_HEADS, "upper_half")
    for row in rows:
        layout, tokens = SequenceLayout.dense(1, row["length"]), row["length"] // RANKS
        lend_from = 0 if row["variant"] == BALANCED else None
        spec = AttentionSpec(OURS.get(row["variant"], "full"), GROUP, lend_from=lend_from)
        # A ring passes on as much as an all-gather delivers.
        bytes_of_ranks = halo_bytes(layout, spec, heads, RANKS, tokens, DIM, 4)
        assert row["sent_bytes"] == [sent for sent, _ in bytes_of_ranks]
        # Two medians of two noisy runs: the forward alone may even be the slower one.
        assert 0 < row["forward_ms"] < 1e5 and 0 < row["forward_backward_ms"] < 1e5
    for length in LENGTHS:
        of_variant = {row["variant"]: row for row in rows if row["length"] == length}
        still, moved = (of_variant[name]["sent_bytes"] for name in ("full, our all-gather", BALANCED))
        assert all(more > less for less, more in zip(still, moved, strict=True)), "queries one way, outputs the other"
        rings = [row for row in rows if row["length"] == length and row["variant"] in RINGS]
        assert max(row["forward_backward_speedup"] for row in rings) == 1
        assert max(row["forward_speedup"] for row in rings) == 1


def _refused(rank: int, world: int, file: str) -> tuple[int, str]:
    """As `_bench`, where the ring's kernel fails on rank 1."""
    from tools.bench import context

    context.refuses = lambda *_: rank == 1  # type: ignore[assignment]
    return _bench(rank, world, file)


def test_a_kernel_that_fails_on_one_rank_is_left_out_by_all(tmp_path: Path) -> None:
    (code, text), (other_code, _) = run_ranks(_refused, RANKS, str(tmp_path / "rows.json"), timeout=200)
    assert (code, other_code) == (1, 1)
    assert text.count("error inf") == text.count(": WRONG, not timed") == len(RINGS)
    assert text.count(": right") == len(OURS)


def test_a_kernel_is_asked_for_every_shape_of_the_ring(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = select_backend("auto", torch.device("cpu"), torch.float32, DIM).lse[0]
    q, k, v, dout = (torch.randn(1, heads, 32, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    assert not refuses(kernel, q, k, v, dout) and not capsys.readouterr().err
    for wrong in ((32, 16, False), (16, 32, False), (32, 32, True)):

        def forward(*call: Any, wrong: Any = wrong) -> Any:
            if (call[0].shape[2], call[1].shape[2], call[3]) == wrong:
                raise RuntimeError("no plan")
            return kernel.forward(*call)

        assert refuses(replace(kernel, forward=forward), q, k, v, dout)
        assert "no plan" in capsys.readouterr().err
