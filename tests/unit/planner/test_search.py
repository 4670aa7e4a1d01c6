"""The search that skips layouts finds what looking at all of them finds, and what it skips by is a bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import ConfigError
from pipeline.config.run import RunConfig
from pipeline.config.sections import AttentionConfig, DataConfig, ModelConfig, TrainConfig
from pipeline.planner import search
from pipeline.planner.choose import Cut, Layouts, Site, Timed, candidates, ranked
from pipeline.planner.explain import named
from pipeline.planner.gpus import find_gpu
from pipeline.planner.models import find_model
from pipeline.planner.search import Bounds, best_by_kind, kind_of
from pipeline.planning.memory import GIB

ARCHS = {name: find_model(name).arch for name in ("smollm2-135m", "llama3-8b", "qwen2.5-7b", "llama2-70b")}
ARCHS["windowed"] = replace(ARCHS["llama3-8b"], sliding_window=4096)


@st.composite
def questions(draw: st.DrawFn) -> tuple[RunConfig, str, Site]:
    """Runs of all sorts on up to 32 GPUs."""
    group = draw(st.sampled_from([None, 2048]))
    attention = AttentionConfig(group_size=group, full_last_steps=draw(st.sampled_from([0, 3])))
    if draw(st.integers(0, 4)) == 0:
        attention = AttentionConfig("full")
    model = ModelConfig("x", draw(st.sampled_from([4096, 16384, 65536, 1 << 19])))
    form = draw(st.sampled_from(["bf16", "bf16", "nf4", "fp8", "te"]))
    model = replace(model, family="te") if form == "te" else replace(model, base=form)
    train = TrainConfig(10, draw(st.sampled_from([8, 48, 64])), gate_up=draw(st.sampled_from(["gpu", "fp8", "host"])),
                        recompute="pointwise")  # fmt: skip
    if group and attention.kind == "s2" and not attention.full_last_steps:
        train = replace(train, stream=draw(st.sampled_from([None, None, "auto", 16384])))
    host = draw(st.sampled_from([None, None, 48 * GIB]))
    site = Site.of(find_gpu(draw(st.sampled_from(["h100-80gb", "b200", "a100-40gb", "rtx4090"]))),
                   draw(st.sampled_from([1, 3, 4, 8, 16, 32])), host)  # fmt: skip
    return (
        RunConfig(model, DataConfig("text"), train, "run", attention=attention),
        draw(st.sampled_from([*ARCHS])),
        site,
    )


def _all_looked_at(config: RunConfig, name: str, site: Site) -> dict[str, Timed]:
    kinds: dict[str, Timed] = {}
    for one in ranked(candidates(config, ARCHS[name], site)):
        grid, parallel = one.candidate.plan.grid, one.candidate.plan.config.parallel
        cut = Cut(grid.tp, grid.cp, grid.pp, one.candidate.plan.config.train.micro_batch)
        kinds.setdefault(kind_of(parallel.engine, cut), one)
    return kinds


def _told(kinds: dict[str, Timed]) -> list[tuple[str, str, float, int]]:
    return [(kind, named(one.candidate.plan), one.time.total, one.candidate.memory.gpu_total)
            for kind, one in kinds.items()]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(questions())
def test_what_is_found_is_what_looking_at_all_finds(question: tuple[RunConfig, str, Site]) -> None:
    config, name, site = question

    def told(found: Callable[[], dict[str, Timed]]) -> list[tuple[str, str, float, int]]:
        try:
            return _told(found())
        except ConfigError:
            return []

    assert told(lambda: best_by_kind(config, ARCHS[name], site)) == told(lambda: _all_looked_at(config, name, site))


@settings(max_examples=12, deadline=None)
@given(questions())
def test_no_layout_undercuts_its_bounds(question: tuple[RunConfig, str, Site]) -> None:
    config, name, site = question
    try:
        layouts = Layouts(config, ARCHS[name], site)
    except ConfigError:
        return
    bounds = Bounds(layouts)
    for cut in [*layouts.cuts()][::3]:
        for word in layouts.words:
            for engine in layouts.engines(cut):
                found = list(layouts.of(cut, engine, (word,)))
                assert all(one.time.total >= bounds.seconds(cut, word) for one in found)
                assert bounds.may_fit(cut, engine, word) or not any(one.fits for one in found)


def test_few_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is for: of 6752 layouts on 4096 GPUs a tenth."""
    train = TrainConfig(10, global_batch=32768)
    config = RunConfig(ModelConfig("x", 32768), DataConfig("text"), train, "run")
    site, looked, honest = Site.of(find_gpu("h100-80gb"), 4096), 0, search.Candidate.of

    def counted(*args: object) -> object:
        nonlocal looked
        looked += 1
        return honest(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(search.Candidate, "of", counted)
    assert len(best_by_kind(config, ARCHS["llama2-70b"], site)) == 5 and 5 < looked < 675
