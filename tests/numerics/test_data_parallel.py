"""Replicas on real processes equal one process: gradient sums, sharded AdamW, state at other sizes, order, faults.

One launch of four ranks serves sizes 4 and 2 (two groups of two).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel.axes.data import plan_buckets
from tests.numerics.data_parallel_work import HIDDEN, VOCAB, Model, work
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def results() -> list[dict[Any, Any]]:
    """What four ranks found, by global rank."""
    return run_ranks(work, 4, timeout=240)


SIZES = pytest.mark.parametrize("size", [2, 4])


@SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replicas_equal_one_process(results: list[dict[Any, Any]], size: int, dtype: torch.dtype) -> None:
    for rank, found in enumerate(results):
        one = found[size, dtype]
        assert one["worst"] <= 1e-6, f"rank {rank}: summed gradients"
        assert one["equal"], f"rank {rank}: updates, parameters or assembled state"
        assert one["overlap changes nothing"], f"rank {rank}"
        assert one["resumes"], f"rank {rank}: state loaded by 1, 2 and 4 ranks continues differently"
        assert (one["first only"] > 0) == (rank % size == 0)
    if dtype is torch.float32:
        assert max(found[size, "free"] for found in results) <= 1e-5


@SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_is_shared_out_evenly(results: list[dict[Any, Any]], size: int, dtype: torch.dtype) -> None:
    counts = [found[size, dtype]["bytes"] for found in results[:size]]
    whole = counts[0][1]
    each = 8 if dtype is torch.float32 else 12
    assert whole == each * sum(p.numel() for p in Model(dtype).parameters())
    assert sum(mine for mine, _ in counts) == whole
    padding = each * 64 * (len(list(Model(dtype).parameters())) + 1)
    assert max(mine for mine, _ in counts) <= whole / size + padding


@SIZES
def test_buckets_start_in_one_order_whatever_the_hooks_do(results: list[dict[Any, Any]], size: int) -> None:
    found = [one[size, "starts"] for one in results]
    assert len({tuple(one["fired"]) for one in found}) == size, "the ranks' hooks must really differ"
    assert all(one["order"] == [192, 64, 0] for one in found)
    assert all(one["sums"] for one in found)
    assert any(max(one["seen"]) for one in found), "some rank must start before finish()"
    assert max(found[size - 1]["seen"]) == 0, "without parameter 3 the first bucket, so every bucket, must wait"


@SIZES
def test_sums_travel_during_the_armed_backward_only(results: list[dict[Any, Any]], size: int) -> None:
    for one in results:
        unarmed, buckets, *during = one[size, "overlap"]
        assert unarmed == 0
        assert during == sorted(during) and during[-1] == buckets
        assert len(during) == 7, "the tied embedding's hook fires once a backward"
        assert during[-2] >= buckets - 1, "all but the embedding's bucket start before the last gradient is there"


@SIZES
def test_chunks_armed_one_by_one_and_slices_of_padding(results: list[dict[Any, Any]], size: int) -> None:
    assert all(one[size, "chunked"] and one[size, "tiny"] for one in results)


@SIZES
@pytest.mark.parametrize("fault", ["twice_reduced", "left_out"])
def test_planted_faults_are_caught(results: list[dict[Any, Any]], size: int, fault: str) -> None:
    """The same comparison that passes at 1e-6 fails clearly."""
    assert min(one[size, fault] for one in results) > 1e-3


def test_sums_over_other_groups_and_the_norm_of_shared_copies(results: list[dict[Any, Any]]) -> None:
    for rank, one in enumerate(results):
        other, mine = one["other"], rank % 2 + 1
        assert other["counts"] == (HIDDEN + 7 * HIDDEN + HIDDEN, VOCAB * HIDDEN)
        expected = {"embed": 3, "norm": 6, "a": 3 * mine, "b": 12, "rare": 5 * mine, "tail": 6 * mine, "bias": 21}
        assert other["values"] == {name: [value] for name, value in expected.items()}
        assert "already summed" in other["twice"]
    sizes = {name: p.numel() for name, p in Model(torch.float32).named_parameters()}
    first, second = (
        sum(sizes[name] * value[0] ** 2 for name, value in results[rank]["other"]["values"].items()) for rank in (0, 1)
    )
    for rank, own in ((0, first), (1, second)):
        local, whole = results[rank]["other"]["norms"]
        assert local == pytest.approx(own**0.5, rel=1e-6)
        assert whole == pytest.approx((first + second - 9 * sizes["embed"]) ** 0.5, rel=1e-6)


def test_misuse_is_told(results: list[dict[Any, Any]]) -> None:
    told = [
        "not summed over",
        "not summed over",
        "not summed over",
        "not one that trains",
        "armed twice",
        "still under way",
        "after bucket",
        "already summed",
        "already summed",
        "after bucket",
    ]
    for one in results:
        assert len(one["misuse"]) == len(told)
        for text, part in zip(one["misuse"], told, strict=True):
            assert part in text


def test_buckets_hold_whole_parameters_from_the_end() -> None:
    spans = [(0, 300), (320, 330), (384, 390), (448, 500)]
    assert plan_buckets(spans, 100) == [[3], [2, 1], [0]]
    assert plan_buckets(spans, 116) == [[3, 2], [1], [0]]
    assert plan_buckets(spans, 1000) == [[3, 2, 1, 0]]
    assert plan_buckets(spans, 1) == [[3], [2], [1], [0]]
    with pytest.raises(ValueError, match="overlap"):
        plan_buckets([(0, 10), (5, 20)], 10)
    with pytest.raises(ValueError, match="positive"):
        plan_buckets(spans, 0)
