"""What a user does, through the commands' own main functions: train, stop, resume, evaluate, export, verify, report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.export.verify import sample_tokens
from pipeline.train import main as train
from tests.numerics.test_training import losses, write_run
from tools.evaluate import main as evaluate
from tools.export_hf import main as export
from tools.report import main as report


def test_train_stop_resume_evaluate_export_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = write_run(tmp_path, "run", kind="llama2"), tmp_path / "run"
    # Tied weights and GQA are test_import_export's; held-out text is one the run does not train on.
    (tmp_path / "held-out.txt").write_text(" ".join(f"w{n % 25}{'abc'[n % 7 % 3]}" for n in range(800)))
    common = ["--config", str(path), "--set", f"eval.path={tmp_path / 'held-out.txt'}", "--set", "eval.windows=2"]

    assert train([*common, "--stop-after", "3"]) == 0
    assert (run / "checkpoints/latest").read_text().strip() == "step-000003"
    assert not (run / "eval-after.json").exists()
    assert train([*common, "--profile", "2"]) == 0
    assert (run / "profile/step-000005-rank-0.txt").read_text().startswith("step 5, rank 0: ")
    assert "resumed at step 3" in capsys.readouterr().out
    assert (run / "checkpoints/latest").read_text().strip() == "step-000006"
    assert len(losses(run)) == 6 and losses(run)[-1] < losses(run)[0]

    assert evaluate([*common, "--state", "shipped"]) == 0
    assert evaluate([*common, "--compare"]) == 0
    told = capsys.readouterr().out
    assert all(row in told for row in ("as shipped", "RoPE stretched, untrained", "trained"))
    figures = [json.loads((run / f"eval-{key}.json").read_text()) for key in ("shipped", "untrained", "after")]
    assert [figure["label"] for figure in figures] == ["shipped", "untrained", "after"]

    with monkeypatch.context() as closed:
        # Other settings are told before a model is loaded.
        closed.setattr("pipeline.evaluation.states.build_model", None)
        assert evaluate([*common, "--state", "trained", "--set", "attention.shifted_heads=alternate"]) == 2
    assert "attention.shifted_heads" in capsys.readouterr().err

    for form in ("adapter", "merged"):
        assert export(["--run", str(run), "--output", str(tmp_path / form), "--format", form]) == 0
        assert json.loads((tmp_path / form / "verify.json").read_text())["passed"]
    assert capsys.readouterr().out.count("verified") == 2
    tokens, base = sample_tokens(128, 64), tmp_path / "base"
    config = AutoConfig.from_pretrained(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, config=config), tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    shipped = AutoModelForCausalLM.from_pretrained(base, config=config)
    with torch.no_grad():
        one, other, before = (model.eval()(tokens).logits for model in (adapted, merged, shipped))
    assert merged.config.max_position_embeddings == 64
    assert (one - other).abs().max() < 1e-4 < 1e-2 < (one - before).abs().max()

    assert report(["--run", str(run)]) == 0
    page = (run / "report/index.html").read_text()
    assert "data:image/png;base64," in page
    assert {path.name for path in (run / "report").iterdir()} >= {"index.html", "loss.png", "perplexity_by_length.png"}
    for name in ("config.yaml", "run.json", "metrics.jsonl"):
        assert (run / name).stat().st_size > 0
