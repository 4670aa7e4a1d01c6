"""RULER during training is what tools.evaluate measures; its cost is said first, and a fallen effective length last."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.evaluation import RULER_TASKS
from pipeline.config.yaml_file import load_config
from pipeline.evaluation.assessment import Assessment, verdict
from pipeline.evaluation.perplexity import EvalReport
from pipeline.evaluation.ruler.results import RulerReport, RulerResult, ruler_path
from pipeline.train import main as train
from tests.support.places import run_place
from tools.evaluate import main as evaluate
from tools.report import main as report

RUN = """
model: {{path: {0}/base, context: 1600, rope: {{type: abf, theta: 200000}}}}
attention: {{group_fraction: 0.25}}
lora: {{rank: 2}}
data: {{path: {0}/train}}
train: {{steps: 2, global_batch: 1, lr: 1.0e-2, warmup_steps: 1}}
eval: {{path: {0}/val, lengths: [800, 1600], windows: 1, tasks: [ruler_fwe, niah_single_2], ruler_lengths: [1200, 1600],
  ruler_trials: 2, trials: 3}}
output: {0}/run
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_place(tmp_path_factory.mktemp("ruler"), 1200, 4000, RUN, first="red.")


def test_a_run_measures_what_tools_evaluate_does(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, common = place / "run", ["--config", str(place / "run.yaml")]
    assert train(common) == 0
    out = capsys.readouterr().out
    for label in ("shipped", "untrained", "after"):
        found = RulerReport.read(ruler_path(run, label))
        lengths = (1200,) if label == "shipped" else (1200, 1600)
        # In RULER's order, whatever the order in the YAML; 2 prompts, not depths x trials.
        cells = [(cell.task, cell.length, len(cell.scores)) for cell in found.cells]
        assert cells == [(task, n, 2) for n in lengths for task in ("niah_single_2", "ruler_fwe")]
    # Said once for the base's lengths and once for the run's, before anything of it is measured.
    costs = [line for line in out.splitlines() if "floating-point operations, and their answers" in line]
    assert [line.split(":")[0] for line in costs] == ["RULER, shipped", "RULER, untrained"]
    assert "8 prompts of" in costs[1] and "training steps have)" in costs[1]
    assert out.index(costs[1]) < out.index("RULER, untrained, mean of 2 tasks: 1200: 0%, 1600: 0%")
    assert "RULER, after: effective length 0 tokens: 85.6% or more over 2 tasks (RULER's threshold)" in out
    last = out.rstrip().splitlines()[-1]
    assert last.startswith("verdict: ") and "does none of its tasks at its own length" in out

    # The same by tools.evaluate, which takes tasks' lengths and prompts from the run.
    mine = RulerReport.read(ruler_path(run, "after"))
    ruler_path(run, "after").unlink()
    assert evaluate([*common, "--state", "trained", "--tasks", "niah_single_2,ruler_fwe"]) == 0
    assert "training steps" not in capsys.readouterr().out
    assert replace(RulerReport.read(ruler_path(run, "after")), model=None) == mine
    alone = ["--model", str(place / "base"), "--text", str(place / "val"), "--output", str(place / "alone")]
    alone += ["--tasks", "niah_single_2,ruler_fwe", "--lengths", "1200", "--depths", "2", "--trials", "1"]
    assert evaluate(alone) == 0
    assert RulerReport.read(ruler_path(place / "alone", "shipped")).cells == (
        RulerReport.read(ruler_path(run, "shipped")).cells
    )
    assert report(["--run", str(run)]) == 0
    page = (run / "report" / "index.html").read_text()
    assert "<h2>RULER</h2>" in page and "ruler_fwe" in page and "effective length 0 tokens" in page
    # What is missing of the last evaluation is made up, and nothing else.
    capsys.readouterr()
    ruler_path(run, "after").unlink()
    assert train(common) == 0
    assert "RULER, after: 8 windows" in capsys.readouterr().out and ruler_path(run, "after").exists()
    # And so is what is asked newly, once.
    changes = "eval.ruler_lengths=[1300]", "eval.ruler_trials=3", "eval.tasks=[niah_single_1]"
    for change, told in ((changes[0], True), (changes[0], False), *((change, True) for change in changes[1:])):
        assert train([*common, "--set", change]) == 0
        assert ("RULER, after: effective length" in capsys.readouterr().out) is told, change
    assert train([*common, "--set", "eval.ruler_trials=1"]) == 0
    assert "RULER, after" not in capsys.readouterr().out, "more prompts answer too"
    # What was not asked again is still told of, and a mean over fewer tasks is no measure beside the others.
    whole = RulerReport.read(ruler_path(run, "after"))
    counts = {(cell.task, cell.length): len(cell.scores) for cell in whole.cells}
    assert counts == {
        **{(task, n): 3 for n in (1200, 1600) for task in ("niah_single_2", "ruler_fwe")},
        **{(task, 1300): 2 for task in ("niah_single_2", "ruler_fwe")},
        **{("niah_single_1", n): 2 for n in (1200, 1600)},
    }


def test_a_report_that_cannot_be_written_or_read_ends_no_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As for every other file of an evaluation: it is told, and the run goes on."""
    run = place / "refused"
    command = ["--config", str(place / "run.yaml"), "--set", f"output={run}"]
    command += ["--set", "eval.tasks=[ruler_fwe, passkey]", "--set", "eval.lengths=[800]", "--set", "train.steps=1"]
    paths = [run / f"{kind}-{label}.json" for kind in ("ruler", "retrieval") for label in ("shipped", "after")]
    for path in paths:
        path.mkdir(parents=True)  # whom permissions do not stop either cannot write a file there
    assert train(command) == 0
    told = capsys.readouterr().err
    assert all(told.count(f"{path}: cannot be written (") == 1 for path in paths), told
    for path in paths:
        path.rmdir()
    paths[0].write_text("{")
    assert train(command) == 0
    told = capsys.readouterr().err
    assert f"{paths[0]}: is no RULER report (" in told and "judged by RULER's threshold" in told
    assert RulerReport.read(paths[1]).cells, "made up"


def made(label: str, scores: dict[str, dict[int, float]]) -> RulerReport:
    cells = [RulerResult(task, n, (s,), ("",)) for task, row in scores.items() for n, s in row.items()]
    return RulerReport(label, 0 if label == "shipped" else 2, 1600, 400, tuple(cells))


def test_a_fallen_effective_length_is_told(place: Path, tmp_path: Path) -> None:
    data = {"step": 0, "stride": None, "seconds": 1.0, "lengths": []}
    for label in ("shipped", "after"):
        (tmp_path / f"eval-{label}.json").write_text(json.dumps({"label": label, **data}))
    made("shipped", {"a": {200: 1.0, 400: 0.8}, "b": {200: 0.5, 400: 0.4}, "c": {200: 0, 400: 0}}).write(
        ruler_path(tmp_path, "shipped")
    )
    # 0.9 + 0.4 at 200 reach what the base has at its own 400, 0.6 in the mean; 0.7 + 0.3 do not. c is left out.
    after = made("after", {"a": {200: 0.9, 400: 0.7, 800: 1}, "b": {200: 0.4, 400: 0.3, 800: 1}, "c": {200: 0, 400: 1}})
    after.write(ruler_path(tmp_path, "after"))
    (said,) = verdict(tmp_path, 400)
    assert said == (
        "RULER's effective length fell from 400 tokens, the base's, to 200: at 400 it scores 50% where 60% over 2 "
        "tasks is wanted (the base's own score at 400 tokens)."
    )
    kept = made("after", {"a": {200: 0.9, 400: 0.8, 800: 1}, "b": {200: 0.4, 400: 0.4, 800: 1}, "c": {200: 0}})
    kept.write(ruler_path(tmp_path, "after"))
    assert verdict(tmp_path, 400) == ["nothing that the base can do at its own lengths was lost, of what was measured."]
    fewer = made("after", {"a": {200: 0.9, 300: 0, 400: 0.9}, "b": {200: 0.9, 400: 0.9}})
    assert fewer.effective(None).tokens == 400, "300 was asked of a alone"
    base = RulerReport.read(ruler_path(tmp_path, "shipped"))
    points = Assessment(EvalReport("after", 2, None, (), 1.0), None, None, kept, base).points
    assert points["ruler/effective_length"] == 800 and points["ruler/a/400"] == 0.8
    assert points["ruler/mean/400"] == pytest.approx(0.6), "over the tasks asked at this length"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("eval.tasks=[niah_single_9]", "is not one of passkey, needle, ruler, dense_gap, niah_single_1"),
        ("eval.ruler_trials=0", "eval.ruler_trials: must be at least 1"),
        ("eval.ruler_lengths=[1]", "eval.ruler_lengths: must be at least 2"),
        ("eval.ruler_lengths=[300]", "RULER length 300: has no room"),
        ("eval.ruler_lengths=[90000]", "Evaluation text: has"),
    ],
)
def test_bad_input_is_one_sentence(place: Path, change: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(place / "run.yaml"), "--set", f"output={place}/wrong", "--set", change]
    assert train(arguments) == 2
    assert told in capsys.readouterr().err


def test_a_length_beyond_the_context_is_warned_of(place: Path) -> None:
    config = load_config(place / "run.yaml", ["eval.ruler_lengths=[3200]"])
    assert "eval.lengths: 3200 exceed model.context 1600" in config.warnings[0]
    assert load_config(place / "run.yaml", ["eval.tasks=[ruler]"]).ruler_tasks == RULER_TASKS
