"""Equal seconds: the steps that come of a timing, by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.errors import DataError
from pipeline.config.run import RunConfig
from pipeline.config.sections import AttentionConfig, DataConfig, ModelConfig, TrainConfig
from tools.study.pace import TIMED, WARM, Pace, pace_of, timing_run, with_steps

RUN = RunConfig(
    ModelConfig("base", 1000),
    DataConfig("text"),
    TrainConfig(steps=100, warmup_steps=20),
    "out",
    AttentionConfig(full_last_steps=30),
)


def test_a_step_takes_what_its_two_attentions_take() -> None:
    """Warm-up steps, and one that a scheduler disturbed, do not count."""
    sparse = [9.0] * WARM + [1.0, 1.0, 7.0, 1.0, 1.0]
    full = [8.0] * WARM + [2.0] * TIMED
    pace = pace_of(RUN, [*sparse, *full], "CPU")
    assert pace == Pace(pytest.approx(0.7 * 1 + 0.3 * 2), "CPU")
    assert pace.steps_in(65) == 50 and pace.steps_in(0.1) == 1
    short = timing_run(RUN, Path("t"))
    assert short.train.steps == len(sparse) + len(full) and short.attention.full_last_steps == len(full)
    assert [short.in_full(step) for step in range(short.train.steps)] == [False] * len(sparse) + [True] * len(full)


@pytest.mark.parametrize(("kind", "last"), [("s2", 0), ("s2", 100), ("full", 0)])
def test_one_attention_is_timed_alone(kind: str, last: int) -> None:
    run = replace(RUN, attention=AttentionConfig(kind=kind, full_last_steps=last))
    short = timing_run(run, Path("t"))
    assert short.train.steps == WARM + TIMED
    assert short.in_full(0) == run.in_full(0)
    assert pace_of(run, [9.0] * WARM + [3.0] * TIMED, "x").step_seconds == 3.0


def test_a_longer_run_keeps_its_shape() -> None:
    longer = with_steps(RUN, 250)
    assert (longer.train.steps, longer.train.warmup_steps, longer.attention.full_last_steps) == (250, 50, 75)
    assert with_steps(RUN, 100) == RUN
    assert with_steps(RUN, 1).attention.full_last_steps <= 1


def test_a_pace_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "paces" / "a.json"
    assert Pace.read(path) is None
    Pace(0.25, "H200").write(path)
    assert Pace.read(path) == Pace(0.25, "H200")
    for wrong in ('{"step_seconds": 0, "device": "x"}', "[]", json.dumps({"device": "x"})):
        path.write_text(wrong)
        with pytest.raises(DataError, match="is no pace of a recipe .*move it away, and rerun"):
            Pace.read(path)
