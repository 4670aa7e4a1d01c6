"""A run on conversations measures the answers of held-out ones before, during and after; what cannot be measured on
them is refused by preflight and by the run itself, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from pipeline.evaluation.answers import AnswersReport
from pipeline.train import main as train
from tests.support.tiny_models import make_tiny, write_tokenizer
from tools.evaluate import main as evaluate
from tools.preflight import main as preflight
from tools.prepare_data import main as prepare
from tools.report import main as report

ROOT = Path(__file__).parents[2]
RUN = """
model: {{path: {0}/base, context: 128, rope: {{type: linear, factor: 2}}}}
attention: {{kind: full}}
lora: {{rank: 4}}
data: {{path: {0}/data/train, sequence: 128, mask_documents: true}}
train: {{steps: 6, global_batch: 2, lr: 5.0e-2, lr_embed_norm: 1.0e-2, warmup_steps: 1}}
eval: {{path: {0}/data/validation, every: 3}}
save: {{every: 3}}
output: {0}/run
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("answers")
    make_tiny(root / "base", "llama2")
    write_tokenizer(root / "base")
    rows = [{"instruction": f"What is {n}?", "output": "ab"} for n in range(60)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "t.jinja").write_text(
        "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}{%- generation -%}"
        "{{- ' A ' + message['content'] + eos_token -}}{%- endgeneration -%}{%- else -%}{{- message['content'] -}}"
        "{%- endif -%}{%- endfor -%}"
    )
    arguments = ["--input", str(root / "rows.jsonl"), "--output", str(root / "data"), "--held-out", "0.2"]
    tokenizer = ["--tokenizer", str(root / "base"), "--chat-template", str(root / "t.jinja")]
    assert prepare(["--chat", *arguments, *tokenizer]) == 0
    (root / "run.yaml").write_text(RUN.format(root))
    return root


def test_answers_are_measured_before_during_and_after(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, common = place / "run", ["--config", str(place / "run.yaml")]
    assert train([*common, "--stop-after", "4"]) == 0
    assert train(common) == 0
    out = capsys.readouterr().out
    found = {
        label: AnswersReport.read(run / f"answers-{label}.json") for label in ("untrained", "step-000003", "after")
    }
    assert [one.step for one in found.values()] == [0, 3, 6]
    for label, one in found.items():
        assert f"answers, {label}: loss {one.nll:.4f}, perplexity {one.perplexity:.4g}, word for word" in out
    assert not list(run.glob("eval-*.json"))

    # All answers are the same words, which a few steps learn.
    before, after = found["untrained"], found["after"]
    assert after.nll < before.nll - 0.5
    (verdict,) = [line for line in out.splitlines() if line.startswith("verdict: ")]
    assert f"a loss of {before.nll:.4f} before training and of {after.nll:.4f} now" in verdict and "better" in verdict

    # The same command measures nothing twice, and what is missing it makes up.
    with mock.patch("pipeline.evaluation.answers_evaluator.measure_answers", side_effect=AssertionError("again")):
        assert train(common) == 0
    (run / "answers-after.json").unlink()
    assert train(common) == 0
    assert AnswersReport.read(run / "answers-after.json").conversation_nll == after.conversation_nll

    # tools.evaluate of the checkpoint finds what the run found, and its table says it.
    (run / "answers-after.json").unlink()
    capsys.readouterr()
    assert evaluate([*common, "--state", "trained"]) == 0
    again = AnswersReport.read(run / "answers-after.json")
    assert again.conversation_nll == pytest.approx(after.conversation_nll, rel=1e-6) and again.tokens == after.tokens
    shown = " ".join(capsys.readouterr().out.split())
    assert "Answers on held-out conversations" in shown and f"{after.nll:.4f}" in shown
    assert "run, trained: answers of" in shown and "before training" in shown

    assert report(["--run", str(run)]) == 0
    page = (run / "report" / "index.html").read_text()
    assert "Answers on held-out conversations" in page and f"{before.nll:.4f}" in page and verdict[9:40] in page
    assert "this run was not evaluated" not in page


def test_evaluations_of_a_model_that_is_gone_are_forgotten(place: Path) -> None:
    from pipeline.evaluation.forget import forget_later

    later = place / "run" / "answers-step-000099.json"
    AnswersReport("step-000099", 99, 9, (1,), (1.0,), (0,), 1.0, "x").write(later)
    forget_later(place / "run", 50)
    assert not later.exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("eval.tasks=[passkey,dense_gap]", "passkey, dense_gap are measured on text, so leave them out"),
        ("model.context=16", "holds a conversation of"),
        ("data.mask_documents=false", "holds conversations, which must not attend to each other; set it to true"),
        ("data.sequence=16", "but a window has 16; prepare it again with --max-tokens 16, or raise data.sequence"),
        ("report_to=[trackio]", "report_to: trackio is not installed; pip install trackio"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_loaded(
    place: Path, change: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["--set", change, "--set", f"output={place / 'never'}"]
    if change.startswith("model.context"):
        overrides += ["--set", "data.sequence=16", "--set", f"data.path={ROOT / 'launch/demo/train'}"]
        overrides += ["--set", "model.rope={type: none}"]
    command = ["--config", str(place / "run.yaml"), *overrides]
    preflight([*command, "--nproc", "1"])
    assert told in capsys.readouterr().err
    with (
        mock.patch("pipeline.build.open_base", side_effect=AssertionError("the base was opened")),
        mock.patch("pipeline.build.build_model", side_effect=AssertionError("the model was loaded")),
    ):
        assert train(command) == 2
    assert told in capsys.readouterr().err


def test_other_tasks_are_refused_on_conversations(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--config", str(place / "run.yaml"), "--state", "untrained", "--tasks", "perplexity,ruler_vt"]
    with mock.patch("pipeline.evaluation.states.build_model", side_effect=AssertionError("the model was loaded")):
        assert evaluate(command) == 2
    assert "ruler_vt is measured on text, so leave it out, or point eval.path at text" in capsys.readouterr().err
