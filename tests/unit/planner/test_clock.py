"""What a step waits for, case by case against arithmetic: copies, gathers, parked halos, the host."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest

from pipeline.planner import clock
from pipeline.planner.clock import StepTime, step_time
from pipeline.planner.gpus import Gpu, find_gpu
from pipeline.planner.host_work import OPERATIONS, operations, tiles
from pipeline.planner.layer_time import FITTED
from pipeline.planner.traffic import traffic
from pipeline.planning.base_form import layer_bytes
from pipeline.planning.recompute import RecomputePolicy
from pipeline.planning.run_plan import RunPlan
from tools.support.plan_points import Point

H200 = find_gpu("h200")
SLOW = replace(H200, measured={**H200.measured, "pcie": 5e9})
"""Its copies take longer than any layer's pass."""


def plan_of(ranks: int = 1, context: int = 8192, ahead: int = 2, **settings: object) -> RunPlan:
    settings = {"recompute": "none", "engine": "zero3", "params": "cpu", "ahead": ahead, **settings}
    return Point("test", "llama2-70b", ranks, context, settings, "held").plan()


def timed(plan: RunPlan, gpu: Gpu = H200, **options: bool) -> StepTime:
    return step_time(plan, gpu, **options)


def test_copies_that_bound_a_step_are_what_it_takes() -> None:
    plan = plan_of()
    a_layer = layer_bytes("bf16", plan.arch, 1, 2) / SLOW.rate("pcie")
    parts = timed(plan, SLOW).parts
    # A pass begins with two layers at hand; the other 78 come one after another, forward and backward.
    passes = sum(parts[name] for name in ("products", "attention", "pointwise")) - parts["loss"]
    assert parts["copies"] == pytest.approx(2 * 78 * a_layer - 78 / 80 * passes, rel=0.02)
    fast = replace(H200, measured={**H200.measured, "pcie": 5e13})
    assert "copies" not in timed(plan, fast).parts


def test_a_copy_and_a_gather_overlap_where_two_layers_are_fetched_ahead() -> None:
    both = [timed(plan_of(ranks=2, cp=2, ahead=ahead), SLOW) for ahead in (1, 2)]
    waits = [sum(time.parts[name] for name in ("copies", "communication")) for time in both]
    moved = traffic(plan_of(ranks=2, cp=2))
    gathers = 2 * 79 * moved.gather / (FITTED.links * 450e9)
    # With one ahead a layer more is fetched in each pass.
    assert gathers < waits[0] - waits[1] < gathers + 2 * moved.copy / SLOW.rate("pcie")


OLD = ["early_halos"]


def test_without_early_halos_one_waits_for_the_weights_that_are_copied_before_it() -> None:
    """A chunk's copy is shorter than a layer's pass, and would be hidden but for halos: none of one chunk."""
    plan = plan_of(context=32768, base="fp8", stream=16384, group=8192, without=OLD)
    whole = replace(plan, stream=None)
    assert timed(whole).parts.get("copies", 0.0) == 0.0
    copies = timed(plan).parts["copies"]
    layer = layer_bytes("fp8", plan.arch, 1, 2) / H200.rate("pcie")
    # Two chunks: the second, forward once, has a halo. Queries, keys and values and half of attention come before it.
    assert 0.3 * 80 * layer < copies < 80 * layer
    again = timed(replace(plan, recompute=(RecomputePolicy.FULL,) * 80)).parts["copies"]
    assert again == pytest.approx(2 * copies), "a layer that runs again asks for its halo again"
    on_gpu = {"base": "nf4", "params": "none", "stream": 8192, "group": 8192}
    assert "copies" not in timed(plan_of(context=32768, without=OLD, **on_gpu)).parts


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_an_early_halo_is_never_waited_for_where_copies_are_hidden(recompute: str) -> None:
    streamed = {"context": 32768, "base": "fp8", "stream": 16384, "group": 8192, "recompute": recompute}
    early, late = (timed(plan_of(**streamed, without=without)) for without in ([], OLD))
    assert early.parts.get("copies", 0.0) == 0.0 < late.parts["copies"]
    assert early.total == pytest.approx(late.total - late.parts["copies"])


@pytest.mark.parametrize(("recompute", "halos"), [("none", 5), ("full", 5 + 3)])
def test_an_early_halo_makes_the_weights_after_it_later_by_its_own_copy(recompute: str, halos: int) -> None:
    """Four chunks, of which three have a halo and the last runs forward once; a layer that runs again asks again.

    Keys and values of half the 8 heads, 4096 tokens, 128 wide, bf16: 8 MiB. Two of 80 layers are at hand.
    """
    plan = plan_of(context=32768, base="fp8", stream=8192, group=8192, recompute=recompute)
    assert traffic(plan).parked == 2 * 4 * 4096 * 128 * 2
    copies = timed(plan, SLOW).parts["copies"]
    with mock.patch.object(clock, "traffic", lambda plan: replace(traffic(plan), parked=0.0)):
        bare = timed(plan, SLOW).parts["copies"]
    assert copies - bare == pytest.approx(78 * halos * 2**23 / SLOW.rate("pcie"))


def test_a_short_first_pass_takes_less_by_the_layers_it_does_without() -> None:
    """Four chunks of two groups on one GPU: three first passes do without two and a half of 80 layers each."""
    streamed = {"context": 65536, "stream": 16384, "group": 8192, "engine": "megatron", "params": "none"}
    short, old = (timed(plan_of(**streamed, without=without)) for without in ([], ["short_first_pass"]))
    # Nothing is made again in the backward pass: what is called recompute are three first passes of four forwards.
    saved = old.parts["recompute"] - short.parts["recompute"]
    assert saved == pytest.approx(old.parts["recompute"] * 2.5 / 80, rel=0.1)
    assert short.total == pytest.approx(old.total - saved, rel=1e-3)


def test_no_layer_takes_less_than_the_host() -> None:
    plan = plan_of(ranks=8, context=2048, tp=8, engine="megatron", params="none")
    host = 80 * FITTED.host_op_s * operations(plan.layer, RecomputePolicy.NONE)
    time = timed(plan, alone=True)
    rest = sum(time.parts.get(name, 0.0) for name in ("products", "attention", "pointwise", "waiting"))
    assert rest == pytest.approx(host, rel=0.05) and time.parts["waiting"] > 80 * FITTED.layer_s
    long = timed(plan_of(ranks=8, context=65536, tp=8, engine="megatron", params="none"), alone=True)
    assert long.parts["waiting"] == pytest.approx(80 * FITTED.layer_s)


def test_operations_grow_with_tiles() -> None:
    short, long = (plan_of(ranks=8, context=context, tp=8, base="fp8") for context in (2048, 65536))
    none = RecomputePolicy.NONE
    assert operations(short.layer, none) == OPERATIONS["fp8", True][none][0] and tiles(short.layer, none) == 1
    assert operations(long.layer, none) == OPERATIONS["fp8", True][none][0] + (tiles(long.layer, none) - 1) * 160
    assert operations(short.layer, RecomputePolicy.HOST) == operations(short.layer, RecomputePolicy.POINTWISE)


def test_one_thread_updates_slower_than_those_of_a_launched_rank() -> None:
    plan = plan_of(optimizer="cpu", context=4096)
    assert timed(plan, one_thread=True).parts["optimizer"] > 1.1 * timed(plan).parts["optimizer"]
