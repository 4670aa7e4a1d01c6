"""The cut of a streamed sequence, what its halos take by the plan, and what `auto` makes of a GPU's memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.world.grid import GridPlan
from pipeline.config.yaml_file import load_config
from pipeline.planner.clock import step_time
from pipeline.planner.gpus import find_gpu
from pipeline.planning.arch import LlamaArch
from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout, head_plan
from pipeline.planning.context_shards import halo_plan
from pipeline.planning.memory import GIB
from pipeline.planning.run_plan import RunPlan, plan_model
from pipeline.planning.stream import StreamPlan, chunk_sizes, halo_bytes
from tools.support.shapes import llama2, llama3_8b

CONFIG = Path(__file__).parents[3] / "launch/configs/llama3_8b_1m.yaml"
ONE = GridPlan(1, 1, 1, 1)
MIB = 1 << 20
PLAIN = ("train.gate_up=gpu", "train.recompute=pointwise")
"""The shipped run has more on the host."""


def plan_of(*settings: str, gpu_gib: int = 80) -> RunPlan:
    config = load_config(CONFIG, [*PLAIN, *settings])
    return RunPlan.of(config, *plan_model(config.model, llama3_8b()), 1, gpu_gib * GIB)


def test_the_last_chunk_is_short_and_padded_to_equal_shards() -> None:
    cut = StreamPlan.of(45, 12, GridPlan(tp=2, cp=3, dp=1, pp=1))
    assert cut.starts == (0, 12, 24, 36) and cut.shards == (4, 4, 4, 4) and cut.padded == 48
    assert cut.edges == tuple(range(0, 49, 4))
    cut = StreamPlan.of(38, 12, GridPlan(tp=1, cp=2, dp=1, pp=1))
    assert cut.shards == (6, 6, 6, 1) and cut.edges == (0, 6, 12, 18, 24, 30, 36, 37, 38)
    assert StreamPlan.of(12, 12, ONE).edges == StreamPlan.of(12, 48, ONE).edges == (0, 12)
    with pytest.raises(ValueError, match="chunks of 10 tokens"):
        StreamPlan.of(40, 10, GridPlan(tp=1, cp=4, dp=1, pp=1))


@pytest.mark.parametrize(("arch", "boundary"), [(llama3_8b(), 256), (llama2("70b"), 640)], ids=["8B", "70B"])
def test_a_boundary_costs_half_a_group_of_the_shifted_heads(arch: LlamaArch, boundary: int) -> None:
    """Keys and values of half the KV heads, G / 2 tokens, all layers, bf16: 256 MiB for 8B at G 8192, 640 for 70B."""
    spec = AttentionSpec("s2", 8192)
    for chunk, sequence in ((16384, 65536), (32768, 262144), (8192, 1 << 20)):
        found = halo_bytes(StreamPlan.of(sequence, chunk, ONE), arch, spec, ONE, 1, 2)
        assert found.parked == (sequence // chunk - 1) * boundary * MIB
        assert found.carried == boundary * MIB, "one boundary's gradients wait at a time, however long the sequence"
        assert found.fetched * arch.layers == boundary * MIB, "of one layer, 8 MiB for both"
    # Off the group's multiples unshifted heads reach back as well: more, and still no more than a group of all heads.
    off = halo_bytes(StreamPlan.of(65536, 10240, ONE), arch, spec, ONE, 1, 2)
    assert boundary * MIB < off.carried <= 4 * boundary * MIB


def test_context_ranks_share_what_is_parked() -> None:
    """At a group a rank only the last one parks; its halo goes to the first."""
    grid, spec = GridPlan(tp=1, cp=4, dp=1, pp=1), AttentionSpec("s2", 8192)
    found = halo_bytes(StreamPlan.of(131072, 32768, grid), llama3_8b(), spec, grid, 2, 2)
    assert found.parked == 3 * 2 * 256 * MIB
    assert found.fetched == 2 * 8 * MIB, "the last one's, which sends it"


@given(
    st.sampled_from([(1, 1), (1, 3), (2, 4), (4, 2)]),
    st.sampled_from([8, 24, 32]),
    st.sampled_from([0.5, 1, 1.5, 2, 3.25]),
    st.integers(1, 40),
    st.integers(0, 100),
    st.sampled_from(["upper_half", "alternate", "all"]),
    st.sampled_from([(1, 64), (2, 256), (3, 20)]),
)
def test_what_repeats_is_counted_as_often(
    ranks: tuple[int, int], group: int, groups: float, chunks: int, more: int, rule: str, sizes: tuple[int, int]
) -> None:
    """Every message of every chunk, one by one: of what a rank sends to a later chunk each is parked, aligned."""
    (tp, cp), (rows, vector) = ranks, sizes
    grid, arch = GridPlan(tp, cp, 1, 1), replace(llama3_8b(), heads=8, kv_heads=4, layers=1, head_dim=vector // 2)
    chunk = -(-int(groups * group) // (tp * cp)) * tp * cp
    cut = StreamPlan.of(chunk * chunks - min(more, chunk - 1), chunk, grid)
    spec, parked, carried, fetched = AttentionSpec("s2", group, rule), [0], [0], [0]
    for rank in range(tp):
        heads = head_plan(rank * 8 // tp, 8 // tp, 8, 4, rule)
        messages = halo_plan(SequenceLayout.dense(rows, cut.padded), spec, heads, cut.edges).messages
        for own in range(cp):
            sent = [
                (one.sender // cp, one.receiver // cp, one.vectors * vector)
                for one in messages
                if one.sender % cp == own and one.sender // cp < one.receiver // cp
            ]
            parked.append(sum(-(-size // 64) * 64 for *_, size in sent))
            for at in range(len(cut.starts)):
                carried.append(sum(size for begin, end, size in sent if begin < at <= end))
                fetched.append(sum(size for _, end, size in sent if end == at))
    found = halo_bytes(cut, arch, spec, grid, rows, 2)
    assert (found.parked, found.carried, found.fetched) == (max(parked), max(carried), max(fetched))


def test_auto_is_the_largest_chunk_that_fits() -> None:
    assert [plan_of(gpu_gib=size).stream for size in (40, 80, 141)] == [8192, 16384, 32768]
    for size in (80, 141):
        plan = plan_of(gpu_gib=size)
        assert plan.stream is not None and plan.memory().gpu_total <= size * GIB
        larger = plan_of(f"train.stream={2 * plan.stream}")
        assert larger.memory().gpu_total > size * GIB
    config = load_config(CONFIG, PLAIN)
    assert RunPlan.of(config, *plan_model(config.model, llama3_8b()), 1).stream == 8192, "no GPU: the smallest"
    assert plan_of("train.stream=null").stream is None
    # Full recomputation keeps a layer's input alone, so that several times the tokens fit.
    assert (plan_of("train.recompute=full").stream or 0) >= 8 * 16384
    assert chunk_sizes(100, 16, GridPlan(tp=2, cp=3, dp=1, pp=1)) == (18, 36, 72, 144)


def test_beside_recompute_auto_a_larger_chunk_goes_before_keeping_all() -> None:
    """8B on 80 GB: chunks of 16384 whose pointwise work runs again, not of 8192 that keep everything."""
    plan = plan_of("train.recompute=auto")
    assert plan.stream == 16384 and {policy.name for policy in plan.recompute} == {"POINTWISE", "NONE"}
    assert plan.memory().gpu_total <= 0.95 * 80 * GIB
    smaller = plan_of("train.recompute=auto", "train.stream=8192")
    assert {policy.name for policy in smaller.recompute} == {"NONE"}
    gpu = find_gpu("h100-80gb")
    assert step_time(plan, gpu).total < 0.98 * step_time(smaller, gpu).total
    # What the GPU has no room for in host memory: chunks twice as long again, as docs/RESULTS.md has them measured.
    parks = plan_of("train.recompute=auto", "train.gate_up=host")
    assert parks.stream == 32768 and parks.memory().gpu_total <= 0.95 * 80 * GIB
    assert step_time(parks, gpu).total < 0.99 * step_time(plan, gpu).total


def test_what_a_window_in_full_attention_costs_is_said_before() -> None:
    """8B at 256k: 4 x 128 x 32 heads x 32 layers x N^2 / 2, 128 KiB of keys and values a token."""
    plan = plan_of("train.stream=16384", "eval.lengths=[8192, 262144]")
    (cost,) = plan.prefill_costs()
    assert cost.attention == pytest.approx(4 * 128 * 32 * 32 * 2**35, rel=1e-4)
    assert cost.products == 2 * 218103808 * 32 * 2**18
    assert cost.host == (262144 - 16384) * 128 * 1024 == plan.memory().host["evaluation's keys and values"]
    assert cost.sentence.startswith("a window of 262,144 tokens takes 2.2e+16") and "30.0 GiB of host" in cost.sentence
    assert plan_of("train.stream=null", "eval.lengths=[8192]").prefill_costs() == ()


def test_memory_does_not_depend_on_the_length_but_for_the_host() -> None:
    """64k, 256k, 1M and 4M tokens: the same GPU memory; host memory grows by the halos alone."""
    settings = ("train.stream=16384", "model.context=4194304")
    found = [plan_of(*settings, f"data.sequence={length}").memory() for length in (1 << 16, 1 << 18, 1 << 20, 1 << 22)]
    assert len({estimate.gpu_total for estimate in found}) == 1
    assert [estimate.host["parked halos"] // MIB for estimate in found] == [3 * 256, 15 * 256, 63 * 256, 255 * 256]
    whole = plan_of("train.stream=null", "data.sequence=65536").memory()
    assert whole.gpu["activations"] == 4 * found[0].gpu["activations"] and "parked halos" not in whole.host
    # A layer's halo comes ahead.
    late = plan_of(*settings, "data.sequence=65536", "train.without=[early_halos]").memory()
    assert found[0].gpu_total - late.gpu_total == 8 * MIB
