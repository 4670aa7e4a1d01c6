"""What `eval.tasks` measures during training is what tools.evaluate measures, and the last lines say what was lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file

from pipeline.evaluation.assessment import verdict
from pipeline.evaluation.dense_gap import DenseGap
from pipeline.evaluation.long_ppl import LongPpl
from pipeline.evaluation.perplexity import EvalReport
from pipeline.evaluation.results import CellResult, RetrievalReport
from pipeline.evaluation.tasks import cells as prompts_of
from pipeline.train import main as train
from tests.support.places import run_place
from tools.evaluate import main as evaluate
from tools.report import main as report

RUN = """
model: {{path: {0}/base, context: 800, rope: {{type: abf, theta: 200000}}}}
attention: {{group_fraction: 0.25}}
lora: {{rank: 2}}
data: {{path: {0}/train}}
train: {{steps: 4, global_batch: 1, lr: 1.0e-2, warmup_steps: 1}}
eval: {{path: {0}/val, lengths: [400, 800], windows: 2, every: 2, tasks: [passkey, dense_gap],
  retrieval_lengths: [400, 800], depths: 2, trials: 1}}
output: {0}/run
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_place(tmp_path_factory.mktemp("tasks"), 400, 2000, RUN)


def test_a_run_measures_its_tasks_and_says_what_it_lost(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, common = place / "run", ["--config", str(place / "run.yaml")]
    assert evaluate([*common, "--state", "shipped", "--lengths", "800"]) == 0  # no retrieval, nor the base's own length
    assert "warning: --lengths: 800 exceed the 400 tokens that" in capsys.readouterr().err
    further = EvalReport.read(run / "eval-shipped.json").lengths[0]
    with mock.patch("pipeline.evaluation.evaluator.cells", side_effect=prompts_of) as made:
        assert train([*common, "--stop-after", "3"]) == 0
    assert made.call_count == len({call.args[0] for call in made.call_args_list}) >= 2, "prompts are made once a run"
    assert train(common) == 0
    out = capsys.readouterr().out
    labels = ("untrained", "step-000002", "after")
    for label in labels:
        assert f"passkey-grass-5, {label}, exact (first token given): 400: 0% (0%), 800: 0% (0%)" in out
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(points) == 4

    # The gap's dense side is the perplexity of the same windows; trained heads do not see what full attention shows.
    for label in labels:
        gap = DenseGap.read(run / f"gap-{label}.json")
        results = {r.length: r for r in EvalReport.read(run / f"eval-{label}.json").lengths}
        assert gap.dense_nll == results[800].window_nll and gap.length == 800
        assert all(abs(difference) > 1e-6 for difference in gap.differences)
    assert f"dense gap, after: full attention reads windows of 800 tokens {abs(gap.mean):.4f} nats" in out

    # The base was measured in passing, with its own positions, at its own lengths: what a model of its own gives.
    report_of_base = EvalReport.read(run / "eval-shipped.json")
    assert report_of_base.lengths[1:] == (further,), "what is beyond its own lengths is left alone"
    cells = json.loads((run / "retrieval-shipped.json").read_text())["cells"]
    assert {cell["length"] for cell in cells} == {400}
    arguments = ["--model", str(place / "base"), "--text", str(place / "val"), "--output", str(place / "alone")]
    assert evaluate([*arguments, "--lengths", "400", "--set", "eval.windows=2"]) == 0
    arguments += ["--lengths", "400", "--tasks", "passkey", "--depths", "2", "--trials", "1"]
    assert evaluate(arguments) == 0
    assert report_of_base.lengths[:1] == EvalReport.read(place / "alone" / "eval-shipped.json").lengths
    assert cells == json.loads((place / "alone" / "retrieval-shipped.json").read_text())["cells"]
    # And the trained model's retrieval is that of tools.evaluate, which takes lengths, depths and trials from the run.
    mine = json.loads((run / "retrieval-after.json").read_text())
    (run / "retrieval-after.json").unlink()
    assert evaluate([*common, "--state", "trained", "--tasks", "passkey"]) == 0
    assert json.loads((run / "retrieval-after.json").read_text()) == {**mine, "model": "run"}

    # LongPPL by the base's own key tokens; a model that learned nothing has none that it reads well.
    assert evaluate([*arguments, "--tasks", "longppl", "--short", "64", "--set", "eval.windows=2"]) == 0
    told = capsys.readouterr().out
    assert "LongPPL, shipped: no token is key in windows of 400 (short context: 64)" in told
    keys = place / "alone" / "longppl-shipped.json"
    lengths = ["--set", "eval.lengths=[400]"]
    assert evaluate([*common, *lengths, "--state", "trained", "--tasks", "longppl", "--keys", str(keys)]) == 0
    assert LongPpl.read(run / "longppl-after.json").keys == LongPpl.read(keys).keys
    assert evaluate([*common, "--state", "trained", "--tasks", "longppl", "--keys", str(keys)]) == 2
    assert "--keys: are of other text or windows than these 2 of 800" in capsys.readouterr().err

    with mock.patch("pipeline.evaluation.entry.evaluate_state", side_effect=AssertionError("it was loaded")):
        assert evaluate([*common, "--state", "trained", "--tasks", "longppl", "--keys", str(place / "no.json")]) == 2
    assert "no.json: is no LongPPL report" in capsys.readouterr().err
    assert evaluate([*common, "--state", "trained", "--tasks", "longppl", "--short", "800"]) == 2
    assert "--short: 800 tokens are no less than the windows' 800" in capsys.readouterr().err
    assert evaluate([*common, "--state", "trained", "--checkpoint", str(run)]) == 2
    assert f"--checkpoint: {run} is the folder of a run; leave --checkpoint out" in capsys.readouterr().err
    # Settings of a run that was started with --set lie beside it, and a sentence says so.
    assert evaluate([*common, "--state", "trained", "--set", "lora.alpha=3"]) == 2
    mend = f"give --config {run / 'config.yaml'}, the settings it was trained with."
    assert f"lora.alpha: was 16.0 in the checkpoint and is 3.0 here; {mend}" in capsys.readouterr().err
    assert evaluate(["--config", str(run / "config.yaml"), "--state", "trained", "--tasks", "passkey"]) == 0

    last = [line for line in out.splitlines() if line.startswith("verdict: ")]
    assert out.rstrip().endswith("\n".join(last)) and len(last) >= 1
    assert "passkey-grass-5 at 400 tokens: the base scores 0 here: nothing to lose or win." in last[0]

    assert report(["--run", str(run)]) == 0
    page = (run / "report" / "index.html").read_text()
    assert page.index("the base scores 0 here") < page.index("<h2>Perplexity</h2>"), "said first"
    assert "passkey-grass-5" in page and "Dense gap" in page


def test_what_is_lost_is_told(place: Path, tmp_path: Path) -> None:
    """The sentences are those of the figures in the reports."""

    def write(label: str, nll: float, score: float) -> None:
        run = place / "run"
        data = json.loads((run / "eval-after.json").read_text())
        data["label"], data["lengths"] = label, data["lengths"][:1]
        data["lengths"][0]["window_nll"] = [nll, nll + 0.01]
        (tmp_path / f"eval-{label}.json").write_text(json.dumps(data))
        data = json.loads((run / "retrieval-after.json").read_text())
        data["label"], data["cells"] = label, data["cells"][:1]
        data["cells"][0]["scores"] = [score]
        (tmp_path / f"retrieval-{label}.json").write_text(json.dumps(data))

    assert verdict(tmp_path, 400)[0].startswith("what was lost at short lengths is not known: eval.lengths has")
    write("shipped", 3.0, 1.0)
    write("after", 3.1, 0.0)
    lost, worse = verdict(tmp_path, 400)
    assert lost.endswith("0% where the base has 100% (1 prompt): retrieval that the base had is lost.")
    assert worse == "reads 400 tokens 10.5% worse than the base does."
    (nothing,) = verdict(tmp_path, 100)
    assert nothing == "nothing that the base can do at its own lengths was lost, of what was measured."
    write("after", 3.005, 1.0)
    assert verdict(tmp_path, 400) == [nothing], "half a percent is nothing"
    # Where the base could do no retrieval at its own lengths, perplexity is compared all the same.
    write("after", 3.1, 0.0)
    (tmp_path / "retrieval-shipped.json").unlink()
    assert verdict(tmp_path, 400) == [worse]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("eval.tasks=[passkeys]", "is not one of passkey, needle, ruler, dense_gap"),
        ("eval.path=null", "eval.tasks: there is no held-out text to evaluate on"),
        ("eval.depths=0", "eval.depths: must be at least 1"),
    ],
)
def test_wrong_tasks_are_one_sentence(place: Path, change: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["--config", str(place / "run.yaml"), "--set", change]) == 2
    assert told in capsys.readouterr().err


def test_a_finished_run_measures_what_is_asked_newly(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing that its reports answer already."""
    run, command = place / "asked", ["--config", str(place / "run.yaml"), "--set", f"output={place}/asked"]
    assert train(command) == 0
    (place / "other").mkdir()
    (text,) = (place / "val").iterdir()
    (place / "other/a.txt").write_text(text.read_text()[100:])
    capsys.readouterr()

    def measured(*changes: str) -> bool:
        """Whether the same command measured the trained model again."""
        assert train([*command, *(word for change in changes for word in ("--set", change))]) == 0
        return "perplexity, after: 400" in capsys.readouterr().out

    assert not measured(), "all is there"
    for kind in ("eval", "retrieval"):  # as an earlier release wrote them
        path = run / f"{kind}-after.json"
        data = json.loads(path.read_text())
        assert data.pop("text") == json.loads((run / "eval-shipped.json").read_text())["text"] != ""
        data.pop("seed", None)
        path.write_text(json.dumps(data))
    assert not measured("eval.retrieval_lengths=[800]"), "less is asked than was found"
    for change in (
        "eval.retrieval_lengths=[700]",
        "eval.trials=2",
        "eval.depths=1",
        "eval.tasks=[needle]",
        "eval.lengths=[400, 600]",
        "eval.windows=1",
        "eval.stride=200",
        f"eval.path={place}/other",
    ):
        assert measured(change) and not measured(change), f"{change}: once"
    assert DenseGap.read(run / "gap-after.json").text == EvalReport.read(run / "eval-after.json").text
    DenseGap(**{**vars(DenseGap.read(run / "gap-after.json")), "step": 1}).write(run / "gap-after.json")
    assert measured(f"eval.path={place}/other"), "the gap is another step's"
    assert train([*command, "--set", "eval.trials=3"]) == 0
    assert "verdict: the base was not asked all that is asked now; `longspan evaluate" in capsys.readouterr().out


def test_what_was_found_outlasts_a_rerun(place: Path) -> None:
    """One question more measures that alone, and what else `longspan evaluate` found stays."""
    run, command = place / "outlasts", ["--config", str(place / "run.yaml"), "--set", f"output={place}/outlasts"]
    only_text = [*command, "--set", "eval.tasks=[]"]
    assert train(only_text) == 0
    trained = [*command, "--state", "trained"]
    assert evaluate([*trained, "--lengths", "400", "600", "800"]) == 0
    assert evaluate([*trained, "--tasks", "passkey", "--lengths", "400", "600", "800", "--trials", "2"]) == 0
    parts = {kind: run / f"{kind}-after.json" for kind in ("eval", "retrieval", "gap")}
    inputs = {kind: parts[kind].read_bytes() for kind in ("eval", "retrieval")}

    def files() -> dict[str, bytes]:
        return {kind: path.read_bytes() for kind, path in parts.items() if path.exists()}

    with (
        mock.patch("pipeline.evaluation.evaluator.evaluate", side_effect=AssertionError("perplexity was measured")),
        mock.patch("pipeline.evaluation.evaluator.run_retrieval", side_effect=AssertionError("retrieval was measured")),
    ):
        assert train(only_text) == 0
        assert files() == inputs
        assert train(command) == 0, "the gap alone is missing"
    assert files() == {**inputs, "gap": parts["gap"].read_bytes()}
    before = files()

    def lengths() -> dict[int, int]:
        return {result.length: result.windows for result in EvalReport.read(parts["eval"]).lengths}

    with mock.patch("pipeline.evaluation.evaluator.run_retrieval", side_effect=AssertionError("it was measured")):
        assert train([*command, "--set", "eval.lengths=[400, 700]"]) == 0
    assert lengths() == {400: 2, 600: 2, 700: 2, 800: 2}
    assert {kind: files()[kind] for kind in ("retrieval", "gap")} == {
        kind: before[kind] for kind in ("retrieval", "gap")
    }
    # Another task, of retrieval: its cells come beside those there.
    with mock.patch("pipeline.evaluation.evaluator.evaluate", side_effect=AssertionError("it was measured")):
        assert train([*command, "--set", "eval.tasks=[needle]"]) == 0
    cells = {cell.place: cell for cell in RetrievalReport.read(parts["retrieval"]).cells}
    found = [CellResult.from_json(cell) for cell in json.loads(inputs["retrieval"])["cells"]]
    assert len(found) == 6 and all(cells[cell.place] == cell for cell in found)
    needles = {(length, depth) for task, length, depth in cells if task.startswith("needle")}
    assert len(cells) == 6 + 4 and needles == {(length, depth) for length in (400, 800) for depth in (0.0, 1.0)}
    # Of another text nothing is kept.
    (place / "third").mkdir()
    (place / "third/a.txt").write_text((place / "val/a.txt").read_text()[50:])
    assert train([*command, "--set", f"eval.path={place}/third"]) == 0
    assert lengths() == {400: 2, 800: 2}
    assert {cell.length for cell in RetrievalReport.read(parts["retrieval"]).cells} == {400, 800}
    texts = {EvalReport.read(parts["eval"]).text, RetrievalReport.read(parts["retrieval"]).text}
    assert texts == {DenseGap.read(parts["gap"]).text}


def test_an_evaluation_leaves_what_others_found_of_the_same_model(place: Path) -> None:
    run, common = place / "run", ["--config", str(place / "run.yaml")]
    assert train([*common, "--stop-after", "3"]) == train(common) == 0

    def read(folder: Path, label: str) -> tuple[dict[int, float], set[str]]:
        cells = RetrievalReport.read(folder / f"retrieval-{label}.json").cells
        return EvalReport.read(folder / f"eval-{label}.json").perplexity, {cell.task for cell in cells}

    before, _ = read(run, "after")
    asked = ["--lengths", "400", "--depths", "1", "--trials", "1"]
    assert evaluate([*common, *asked, "--state", "trained", "--tasks", "perplexity,needle"]) == 0
    assert read(run, "after") == (before, {"passkey-grass-5", "needle-text-5"})

    # An earlier checkpoint is not what the run calls trained.
    earlier = ["--checkpoint", str(run / "checkpoints/step-000003"), "--lengths", "400"]
    assert evaluate([*common, "--state", "trained", *earlier]) == 0
    assert read(run, "after")[0] == before
    assert EvalReport.read(run / "eval-step-000003.json").perplexity[400] != before[400]

    # Other positions make another model of the same label, step and text.
    other = ["--state", "untrained", "--tasks", "perplexity"]
    assert evaluate([*common, *other, "--lengths", "400", "--set", "model.rope.theta=300000"]) == 0
    assert read(run, "untrained")[0].keys() == {400}
    assert evaluate([*common, *other, "--lengths", "800"]) == 0
    assert read(run, "untrained")[0].keys() == {800}
    assert evaluate([*common, *other, "--lengths", "400"]) == 0
    assert read(run, "untrained")[0].keys() == {400, 800}

    # So do other weights, in a folder that is no run's.
    shutil.copytree(place / "base", place / "second")
    weights = load_file(place / "second/model.safetensors")
    save_file({name: 1.1 * value for name, value in weights.items()}, place / "second/model.safetensors")

    def shipped(model: str, length: int) -> dict[int, float]:
        words = ["--model", str(place / model), "--text", str(place / "val"), "--output", str(place / "shared")]
        assert evaluate([*words, "--lengths", str(length)]) == 0
        return EvalReport.read(place / "shared/eval-shipped.json").perplexity

    assert shipped("base", 400).keys() == {400} and shipped("base", 200).keys() == {200, 400}
    assert shipped("second", 200).keys() == {200}
