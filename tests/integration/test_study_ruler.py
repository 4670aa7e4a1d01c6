"""A study that judges by RULER too: what tools.evaluate finds, and the effective length of each recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.evaluation.judge import Judgement, JudgeSettings
from pipeline.evaluation.ruler.results import RulerResult
from tests.support.places import study_place
from tools.evaluate import main as evaluate
from tools.study.__main__ import main
from tools.study.plan import Recipe
from tools.study.run import Outcome
from tools.study.table import figures, markdown

STUDY = """
stretch: 2
seeds: [5]
judge: {lengths: [1], retrieval_lengths: [1], tasks: [passkey], windows: 1, trials: 1, tail: 0.5, depths: [0.5],
  ruler_lengths: [1, 1.25], ruler_trials: 2}
common: {attention: {kind: full}, lora: {rank: 2}, train: {steps: 1, global_batch: 1, warmup_steps: 1},
  model.rope: {type: abf, theta: 200000}}
recipes:
  - {name: as shipped, untrained: true, stretch: 1, set: {model.rope: {type: none}}}
  - {name: larger base}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = study_place(tmp_path_factory.mktemp("study"), 1200, 4000, first="red.")
    (folder / "study.yaml").write_text(STUDY)
    return folder


def go(place: Path, *more: str) -> int:
    arguments = ["--study", str(place / "study.yaml"), "--config", str(place / "run.yaml"), "--text"]
    return main(
        [*arguments, str(place / "text"), "--model", str(place / "base"), "--output", str(place / "out"), *more]
    )


def test_recipes_are_judged_by_ruler(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go(place) == 0
    assert "RULER" not in capsys.readouterr().out
    asked = ["--ruler", "ruler_fwe", "niah_single_2"]
    assert go(place, *asked) == 0
    out = capsys.readouterr().out
    assert "already" not in out, "judged by less, it is judged again"
    assert out.index("RULER, of every run: 8 prompts of") < out.index("[1/2] as shipped")
    header = next(line for line in out.splitlines() if line.startswith("| recipe"))
    assert header.endswith("| RULER 1200 | RULER 1500 | effective length |")
    told = "Effective length: the longest to which all means over ruler_fwe, niah_single_2 stay at 85.6% (RULER's"
    assert told in out
    assert "RULER: the base does none of its tasks at its own length: nothing to lose or win." in out
    (path,) = (place / "out").glob("study-*.json")
    kept = json.loads(path.read_text())
    assert [(run["recipe"], run["ruler"]) for run in kept["runs"]] == [
        (name, {"1200": 0.0, "1500": 0.0}) for name in ("as shipped", "larger base")
    ]

    arguments = ["--model", str(place / "base"), "--text", str(place / "text/val"), "--output", str(place / "alone")]
    more = ["--lengths", "1200", "1500", "--tasks", "ruler_fwe,niah_single_2", "--depths", "2", "--trials", "1"]
    assert evaluate([*arguments, *more]) == 0
    theirs = json.loads((place / "alone" / "ruler-shipped.json").read_text())["cells"]
    judged = [json.loads(path.read_text())["judgement"] for path in (place / "out/results").glob("as-shipped*.json")]
    (mine,) = (one["ruler"] for one in judged if one["ruler"])
    assert sorted(mine, key=str) == sorted(theirs, key=str)

    # Each has its own results and its own table in the one folder.
    for questions in (asked, []):
        assert go(place, *questions) == 0
        out = capsys.readouterr().out
        assert "2 of 2 runs are there already" in out and ("| RULER 1200 |" in out) == bool(questions)
    assert "RULER" not in (place / "out/study.md").read_text()
    assert go(place, "--ruler", "niah_single_9") == 2
    assert "'niah_single_9' is not one of niah_single_1" in capsys.readouterr().err


def test_effective_lengths_are_judged_by_the_base(place: Path) -> None:
    assert go(place) == 0
    path = next((place / "out" / "results").glob("as-shipped*.json"))
    judged = Judgement.from_json(json.loads(path.read_text())["judgement"])

    def run(name: str, seed: int, **scores: tuple[float, float]) -> Outcome:
        ruler = tuple(
            RulerResult(task, n, (score,), ("",))
            for task, row in scores.items()
            for n, score in zip((1200, 1500), row, strict=True)
        )
        return Outcome(Recipe(name), seed, replace(judged, ruler=ruler), {})

    base = run("as shipped", 5, a=(0.5, 0.0), b=(0.0, 0.0))
    good, bad = run("x", 5, a=(0.7, 0.5), b=(0.1, 1.0)), run("x", 6, a=(0.6, 0.4), b=(1.0, 1.0))
    table = markdown([base, good, bad], base).splitlines()
    assert table[2].endswith("| 25% | 0% | 1200 |")
    # Of what the base can do, a, at 50%: one seed keeps it to 1500 and the other does not.
    assert table[3].endswith("| 60% ± 28% | 72% ± 4% | 1200, 1500 |")
    assert table[5] == (
        "Effective length: the longest to which all means over a stay at 50.0% (the base's own score at 1200 tokens)."
    )
    found = [entry["effective_length"]["tokens"] for entry in figures([base, good, bad], base)["runs"]]
    assert found == [1200, 1500, 1200]


def test_what_was_judged_before_stays() -> None:
    assert "ruler" not in JudgeSettings((100,)).to_json(), "the hash of older results"
