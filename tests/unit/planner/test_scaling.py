"""Scaling on paper, and links between machines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.config.run import RunConfig
from pipeline.config.sections import AttentionConfig, DataConfig, ModelConfig, TrainConfig
from pipeline.planner.footprint import by_stage, footprint
from pipeline.planner.gpus import find_gpu
from pipeline.planner.layer_time import FAR_HOP_S, NEAR_HOP_S, Links
from pipeline.planner.models import find_model
from pipeline.planner.scaling import Point, efficiency, scale, where_it_stops
from pipeline.planning.run_plan import RunPlan
from tools.support.plan_points import Point as Step

GPUS = (8, 16, 64, 1024)


@pytest.fixture(scope="module", params=[False, True], ids=["strong", "weak"])
def points(request: pytest.FixtureRequest) -> tuple[bool, list[Point]]:
    train, attention = TrainConfig(10, global_batch=64), AttentionConfig(group_size=8192)
    config = RunConfig(ModelConfig("x", 32768), DataConfig("text"), train, "run", attention=attention)
    weak = bool(request.param)
    return weak, scale(config, find_model("llama2-70b").arch, find_gpu("h100-80gb"), GPUS, weak=weak)


def test_nothing_scales_better_than_it_should(points: tuple[bool, list[Point]]) -> None:
    weak, found = points
    assert [point.batch for point in found] == ([64, 128, 512, 8192] if weak else [64] * 4)
    times = [point.best.time.total for point in found if point.best]
    assert len(times) == 4
    if weak:
        assert all(after >= 0.99 * before for before, after in zip(times, times[1:], strict=False))
    else:
        for (before, few), (after, many) in zip(
            zip(times, GPUS, strict=True), zip(times[1:], GPUS[1:], strict=True), strict=False
        ):
            assert before * few / many * 0.99 <= after <= before
    shares = efficiency(found)
    assert shares[0] == 1.0 and all(share is not None and share < 1.01 for share in shares)


def test_where_a_layout_stops_paying_is_told(points: tuple[bool, list[Point]]) -> None:
    weak, found = points
    told = where_it_stops(found)
    assert any(line.startswith("zero3 pays from 8 to") for line in told)
    if not weak:  # a batch of 64 leaves each of 1024 GPUs little to hide the weights behind
        assert any("longer than the best (communication)" in line for line in told)


def test_links() -> None:
    links = Links(near=100.0, far=10.0, node=8)
    assert links.seconds(50, 1, 1) == links.seconds(0, 8, 1) == 0
    assert links.seconds(50, 8, 1) == pytest.approx(0.5 + 7 * NEAR_HOP_S)
    # Eight GPUs of a machine bring in an eighth each over the network; what goes round within is no faster than before.
    assert links.seconds(50, 16, 1) == pytest.approx(50 / 80 + 14 * NEAR_HOP_S + FAR_HOP_S)
    # Ranks a machine apart have a link each.
    assert links.seconds(50, 2, 8) == pytest.approx(5 + FAR_HOP_S)


def test_weights_that_are_kept_again_in_fp8_are_weights() -> None:
    """They were told as work: of Transformer Engine's recipes 2.06 bytes an element of the layers' matrices."""
    config = RunConfig(ModelConfig("x", 8192, family="te"), DataConfig("text"), TrainConfig(10), "run")
    eight = replace(config, model=replace(config.model, fp8_recipe="mxfp8"))
    arch = find_model("llama3-8b").arch
    kept, again = (footprint(RunPlan.shaped(one, arch, 1), 1).gpu["weights"] for one in (config, eight))
    assert again - kept == round(218_103_808 * 2.0625) * 32


def test_pipeline_stages_hold_less_the_later_they_are() -> None:
    plan: RunPlan = Step("x", "llama2-70b", 8, 8192, {"pp": 8, "recompute": "full"}, "held").plan()
    stages = by_stage(plan, 8)
    kept = [stage["kept activations"] for stage in stages]
    assert kept == sorted(kept, reverse=True) and kept[-1] * 8 == kept[0]
    assert stages[0] == {**footprint(plan, 8).gpu, "weights": stages[0]["weights"]}
    whole = sum(stage["weights"] for stage in stages)
    frozen = (80 * 855_638_016 + 32000 * 8192) * 2
    assert whole == pytest.approx(frozen, rel=0.1), "the parts are the model, and what trains with each"


@pytest.mark.parametrize(("model", "context"), [("llama3-8b", 131072), ("llama3-70b", 32768), ("qwen2.5-72b", 1 << 20)])
def test_tables_say_what_follows_from_the_layouts(model: str, context: int) -> None:
    """By definition: a table's figures from its times, and of each kind of layout from where to where it pays."""
    train, attention = TrainConfig(10, global_batch=512), AttentionConfig(group_size=8192)
    config = RunConfig(ModelConfig("x", context), DataConfig("text"), train, "run", attention=attention)
    counts = (32, 512)
    found = scale(config, find_model(model).arch, find_gpu("h100-80gb"), counts, weak=False)
    assert [point.gpus for point in found] == list(counts)
    best = [point.best for point in found if point.best is not None]
    assert len(best) == len(counts)
    for point, one, share in zip(found, best, efficiency(found), strict=True):
        assert point.tokens_per_second == pytest.approx(512 * context / one.time.total / point.gpus)
        assert share == pytest.approx(best[0].time.total * counts[0] / (one.time.total * point.gpus))
        assert min(kind.time.total for kind in point.kinds.values()) >= 0.994 * one.time.total
        assert all(kind.candidate.fits for kind in point.kinds.values())
    assert best[1].time.total < best[0].time.total
    told = where_it_stops(found)
    for kind in {kind for point in found for kind in point.kinds}:
        pays = [
            point.gpus
            for point, one in zip(found, best, strict=True)
            if kind in point.kinds and point.kinds[kind].time.total <= 1.05 * one.time.total
        ]
        lines = [line for line in told if line.startswith(f"{kind} pays")]
        assert bool(lines) == bool(pays)
        if pays:
            assert lines[0].startswith(f"{kind} pays from {pays[0]} to {pays[-1]} GPUs")
            beyond = pays[-1] < counts[-1] and kind in found[-1].kinds
            assert (f"; on {counts[-1]} it takes" in lines[0]) == beyond
