"""Recipes in equal seconds: timed once, then runs of so many steps, beside those of equal tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_study import place as place  # a base, text and a YAML
from tools.study.__main__ import main
from tools.study.pace import TIMED, WARM, Pace
from tools.study.training import Recorder

STUDY = """
stretch: 2
seeds: [5, 6]
judge: {lengths: [1], retrieval_lengths: [1], tasks: [passkey], windows: 1, trials: 1, tail: 0.5, depths: [0.5]}
common: {attention: {kind: s2, full_last_steps: 2}, lora: {rank: 2},
  train: {steps: 4, global_batch: 1, lr: 1.0e-5, warmup_steps: 1}, model.rope: {type: abf, theta: 200000}}
recipes:
  - {name: as shipped, untrained: true, stretch: 1, set: {model.rope: {type: none}}}
  - {name: S2 then full}
  - {name: full, set: {attention: {kind: full}}}
  - {name: three seconds, seconds: 3, set: {attention: {kind: full}}}
"""


def go(place: Path, *more: str) -> int:
    arguments = ["--study", str(place / "seconds.yaml"), "--config", str(place / "run.yaml"), "--model"]
    arguments += [str(place / "base"), "--text", str(place / "text"), "--output", str(place / "seconds")]
    return main([*arguments, "--equal-seconds", "S2 then full", *more])


def test_equal_seconds_beside_equal_tokens(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A machine on which a step in full attention takes twice as long as one under S²: 0.5 s and 0.25 s.
    taken: list[tuple[int, int]] = []
    plain = Recorder.update

    def update(recorder: Recorder, step: int, metrics: dict[str, Any]) -> None:
        taken.append((recorder.total, step))
        # Of the timing run of two attentions, the second half is full; "full" is timed in one part.
        slow = recorder.total == WARM + TIMED or step > WARM + TIMED
        plain(recorder, step, {**metrics, "seconds": 0.5 if slow else 0.25})

    monkeypatch.setattr(Recorder, "update", update)
    # Random weights lose far more than a guess, and on one batch more than on another: that is no divergence here.
    monkeypatch.setattr("pipeline.training.non_finite.MARGIN", 1e9)
    (place / "seconds.yaml").write_text(STUDY)
    assert go(place) == 0
    out = capsys.readouterr().out
    assert out.count("\ntiming ") == 2, "two recipes' ways to train, whatever seeds and names they have"
    results = [json.loads(path.read_text()) for path in (place / "seconds/results").glob("*.json")]
    found = {(data["recipe"], data["seed"]): data["training"] for data in results}
    twin = "full, seconds of S2 then full"
    for seed in (5, 6):
        # 4 steps of 0.25 x 1/2 + 0.5 x 1/2 s are 1.5 s: 3 full steps; 3 s are 6.
        assert found[twin, seed]["steps"] == 3 and found["three seconds", seed]["steps"] == 6
        assert found[twin, seed]["budget"] == {"seconds": 1.5, "step_seconds": 0.5, "device": "CPU"}
        assert found["full", seed]["steps"] == found["S2 then full", seed]["steps"] == 4
        assert "budget" not in found["full", seed]
    assert {data["config"]["train"]["steps"] for data in results if data["recipe"] == twin} == {3}

    page = (place / "seconds" / "seconds.md").read_text()
    tokens, seconds, three = page.split("## Equal ")[1:]
    assert tokens.startswith("tokens") and "| full | 2 | 4 | 0.0032 |" in tokens and twin not in tokens
    assert seconds.startswith("seconds: 3.0 of optimizer steps") and "| three seconds | 2 | 6 | 0.0048 |" in seconds
    assert three.startswith("seconds: those of S2 then full, 1.5 of optimizer steps")
    assert [line.split(" | ")[0] for line in three.splitlines() if line.startswith("| ")] == [
        "| recipe",
        "| as shipped",
        "| S2 then full",
        f"| {twin}",
    ]

    # Done is done; a machine of another speed goes on with the steps there are.
    taken.clear()
    assert go(place) == 0 and not taken
    monkeypatch.setattr(Recorder, "update", plain)
    (removed,) = (place / "seconds/results").glob("full-seconds-of-s2-then-full-6-*.json")
    removed.unlink()
    assert go(place) == 0
    again = json.loads(removed.read_text())
    assert again["training"]["steps"] == 3 and again["training"]["budget"]["step_seconds"] == 0.5
    (pace, _) = (Pace.read(path) for path in (place / "seconds/results/paces").glob("*.json"))
    assert pace is not None


def test_a_recipe_paces_others_though_it_is_not_asked_for(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.non_finite.MARGIN", 1e9)
    (place / "seconds.yaml").write_text(STUDY)
    assert go(place, "--only", "full", "--seeds", "9") == 0
    out = capsys.readouterr().out
    assert "[2/2] full, seconds of S2 then full, seed 9" in out and "] S2 then full, seed 9" not in out
    assert go(place, "--only", "S2") == 2
    assert main(["--plan", "table6", "--model", "x", "--text", "y", "--equal-seconds", "S2", "--list"]) == 2
    assert "--equal-seconds: 'S2' is no recipe with steps of its own; there are: full attention, PI;" in (
        capsys.readouterr().err
    )
