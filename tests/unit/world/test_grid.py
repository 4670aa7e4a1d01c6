"""Grid arithmetic: coordinates, shards, batches, stages; errors name the axis and the nearest sizes that work."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import ConfigError
from parallel.world.grid import (
    GridPlan,
    check_interleaving,
    check_model_fits,
    plan_batch,
    plan_grid,
    plan_stages,
)

AXES = st.integers(1, 6)
GRIDS = st.builds(GridPlan, AXES, AXES, AXES, AXES)


@given(GRIDS)
def test_coordinates_are_one_reshape_of_the_ranks(grid: GridPlan) -> None:
    expected = [
        (tp, cp, dp, pp)
        for pp in range(grid.pp)
        for dp in range(grid.dp)
        for cp in range(grid.cp)
        for tp in range(grid.tp)
    ]
    assert [grid.coordinates(rank) for rank in range(grid.world_size)] == expected
    assert [grid.rank(*place) for place in expected] == list(range(grid.world_size))


@given(AXES, AXES, AXES, st.integers(1, 300))
def test_data_parallelism_takes_the_rest_of_the_world(tp: int, cp: int, pp: int, world: int) -> None:
    model = tp * cp * pp
    if world % model == 0:
        grid = plan_grid(world, tp, cp, pp)
        assert (grid.tp, grid.cp, grid.pp, grid.world_size) == (tp, cp, pp, world)
        return
    with pytest.raises(ConfigError, match=rf"tp {tp} x cp {cp} x pp {pp} = {model} .* {world} launched") as refused:
        plan_grid(world, tp, cp, pp)
    named = [int(n) for n in re.findall(r"launch ([\d or]+),", str(refused.value))[0].split(" or ")]
    working = [n for n in range(1, world + model + 1) if n % model == 0]
    assert named == [n for n in working if n < world][-1:] + [n for n in working if n > world][:1]


@given(GRIDS, st.integers(1, 100_000))
def test_shards_hold_the_sequence_with_the_least_padding(grid: GridPlan, sequence: int) -> None:
    length = grid.shard_tokens(sequence)
    assert length % grid.tp == 0
    assert sequence <= grid.cp * length < sequence + grid.cp * grid.tp


@given(st.integers(1, 500), st.integers(1, 8), st.integers(1, 16))
def test_a_batch_divides_or_names_batches_that_do(total: int, micro: int, dp: int) -> None:
    if total % (micro * dp) == 0:
        assert plan_batch(total, micro, dp).accumulation * micro * dp == total
        return
    with pytest.raises(ConfigError, match=r"^train\.global_batch: ") as refused:
        plan_batch(total, micro, dp)
    named = [int(n) for n in re.findall(r"\d+", str(refused.value).rpartition("; use ")[2])]
    working = [n for n in range(1, total + micro * dp + 1) if n % (micro * dp) == 0]
    below, above = [n for n in working if n < total][-1:], [n for n in working if n > total][:1]
    assert named == below + above


@given(st.integers(1, 100), st.integers(1, 8), st.integers(1, 4))
def test_stages_hold_every_layer_once_in_order_and_balanced(layers: int, pp: int, virtual: int) -> None:
    if pp * virtual > layers:
        with pytest.raises(ConfigError, match=r"^parallel\.pp: ") as refused:
            plan_stages(layers, pp, virtual)
        most = int(re.findall(r"at most (\d+) stages", str(refused.value))[0])
        if virtual <= layers:
            assert len(plan_stages(layers, most, virtual)) == most * virtual
            with pytest.raises(ConfigError):
                plan_stages(layers, most + 1, virtual)
        return
    chunks = plan_stages(layers, pp, virtual)
    assert len(chunks) == pp * virtual
    assert [layer for chunk in chunks for layer in chunk] == list(range(layers))
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes) - min(sizes) <= 1
    if len(sizes) > 2 and max(sizes) > min(sizes):
        # The ends also embed and make the loss: a middle chunk is longer before an end is.
        assert max(sizes[0], sizes[-1]) == min(sizes) or min(sizes[1:-1]) == max(sizes)


def test_the_ends_of_a_pipeline_are_spared() -> None:
    assert [len(chunk) for chunk in plan_stages(10, 4)] == [2, 3, 3, 2]
    assert [len(chunk) for chunk in plan_stages(5, 2, 2)] == [1, 2, 1, 1]


@pytest.mark.parametrize(
    ("tp", "heads", "kv_heads", "ffn", "nearest"),
    [
        (3, 32, 8, 11008, "use 2 or 4,"),  # 7B-like GQA
        (16, 64, 8, 28672, "use 8,"),  # more ranks than KV heads: never replicated
        (2, 9, 3, 1536, "use 1 or 3,"),  # SmolLM2-135M
        (4, 8, 8, 6, "use 2,"),  # the MLP decides
    ],
)
def test_tensor_parallelism_names_the_nearest_sizes(tp: int, heads: int, kv_heads: int, ffn: int, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"^parallel\.tp: {tp} .*{nearest}"):
        check_model_fits(GridPlan(tp, 1, 1, 1), heads, kv_heads, ffn)


@given(st.integers(1, 16), st.integers(1, 12), st.integers(1, 6), st.integers(1, 64))
def test_named_tensor_sizes_work(tp: int, kv_heads: int, per_group: int, ffn: int) -> None:
    heads = kv_heads * per_group
    try:
        check_model_fits(GridPlan(tp, 1, 1, 1), heads, kv_heads, ffn)
    except ConfigError as error:
        assert kv_heads % tp or ffn % tp
        named = re.findall(r"use ([\d or]+),", str(error))[0].split(" or ")
        for size in map(int, named):
            check_model_fits(GridPlan(size, 1, 1, 1), heads, kv_heads, ffn)
            assert size != tp
    else:
        assert kv_heads % tp == 0 and heads % tp == 0 and ffn % tp == 0


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 40))
def test_interleaving_needs_a_pipeline_and_whole_rounds(pp: int, virtual: int, accumulation: int) -> None:
    if virtual == 1 or (pp > 1 and accumulation % pp == 0):
        check_interleaving(pp, virtual, accumulation)
        return
    with pytest.raises(ConfigError, match=rf"^parallel\.virtual: {virtual} ") as refused:
        check_interleaving(pp, virtual, accumulation)
    if pp == 1:
        assert "parallel.pp is 1" in str(refused.value)
        return
    named = [int(n) for n in str(refused.value).rpartition("they are ")[2].rstrip(".").split(" or ")]
    assert named and all(abs(n - accumulation) < pp and n > 0 for n in named)
    for good in named:
        check_interleaving(pp, virtual, good)
