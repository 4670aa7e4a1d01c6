"""--strength: weights part of the way from the base's to the trained ones, exported, evaluated and in a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.checkpoint.tensors import whole_trained
from pipeline.evaluation.perplexity import EvalReport
from pipeline.export.formats import FORMATS, export
from pipeline.export.part_way import part_way
from pipeline.export.verify import sample_tokens, verify
from tests.integration.test_import_export import trained_model
from tests.support.places import study_place
from tests.support.tiny_models import make_tiny
from tools.evaluate import main as evaluate
from tools.export_hf import main as export_main
from tools.study.__main__ import main as study

STRENGTH = 0.3
STUDY = """
stretch: 2
seeds: [5]
judge: {lengths: [1, 2], retrieval_lengths: [1], tasks: [passkey], windows: 2, trials: 1, tail: 0.5, depths: [0.5]}
common: {attention: {kind: s2, group_fraction: 0.5}, lora: {rank: 2}, model.rope: {type: abf, theta: 200000},
  train: {steps: 2, global_batch: 1, lr: 1.0e-2, warmup_steps: 1}}
recipes:
  - {name: untrained, untrained: true}
  - {name: trained}
  - {name: a third, of: trained, strength: 0.3}
  - {name: nothing, of: trained, strength: 0}
"""


def logits(network: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(tokens).logits


@pytest.mark.parametrize("kind", ["llama2", "smollm2"])
def test_exports_lie_on_the_line_from_the_base(tmp_path: Path, kind: str) -> None:
    base = make_tiny(tmp_path / "base", kind, tokenizer=True)
    model = trained_model(base)
    export(model, tmp_path / "all", "merged")
    config = AutoConfig.from_pretrained(tmp_path / "all")
    start = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
    end = AutoModelForCausalLM.from_pretrained(tmp_path / "all", dtype=torch.float32).state_dict()
    tokens = sample_tokens(model.arch.vocab, 48)
    begun, finished = logits(start, tokens), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "all"), tokens)
    with torch.no_grad():
        for name, value in start.named_parameters():
            value.add_(STRENGTH * (end[name] - value))
    want = logits(start, tokens)
    assert min((want - begun).abs().max(), (want - finished).abs().max()) > 0.05, "neither end of the line"
    less = part_way(model, STRENGTH)
    assert less.step == model.step and set(less.trained) == set(model.trained)
    assert all(less.shape(name) == model.shape(name) == tuple(less.trained[name].shape) for name in less.trained)
    for form in FORMATS:
        export(less, tmp_path / form, form)
        if form == "longlora":
            continue
        network: Any = AutoModelForCausalLM.from_pretrained(
            tmp_path / form if form == "merged" else base, config=config
        )
        if form == "adapter":
            network = peft.PeftModel.from_pretrained(network, tmp_path / form)
        assert (logits(network, tokens) - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())
        assert verify(less, tmp_path / form, form, tokens)["passed"]
    assert json.loads((tmp_path / "adapter/longspan.json").read_text())["strength"] == STRENGTH
    assert "weights 30% of the way" in (tmp_path / "adapter/README.md").read_text()
    assert part_way(model, 1.0) is model


def test_a_study_and_an_evaluation_of_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = study_place(tmp_path, 400, 1200)
    (place / "study.yaml").write_text(STUDY)
    common = ["--config", str(place / "run.yaml"), "--model", str(place / "base"), "--text", str(place / "text")]
    asked = ["--study", str(place / "study.yaml"), *common, "--output", str(place / "out")]
    assert study([*asked, "--list"]) == 0
    assert "a third, seed 5: is trained, weaker," in capsys.readouterr().out
    assert study([*asked, "--only", "nothing", "a third"]) == 0  # trains what it is less of
    assert study(asked) == 0
    results = {
        data["recipe"]: data
        for data in map(json.loads, (path.read_text() for path in (place / "out/results").glob("*.json")))
    }
    assert set(results) == {"untrained", "trained", "a third", "nothing"}
    losses = {name: EvalReport.from_json(data["judgement"]["perplexity"]).lengths for name, data in results.items()}
    assert losses["nothing"] == losses["untrained"] != losses["a third"] != losses["trained"]
    (folder,) = (path for path in (place / "out/runs").iterdir() if path.name.startswith("trained-5"))
    assert not [path for path in (place / "out/runs").iterdir() if path.name.startswith(("nothing", "a-third"))]
    assert results["a third"]["training"]["loss"] == results["trained"]["training"]["loss"]

    # The same by the commands a user has: the checkpoint evaluated part of the way, and exported so and read back.
    again = place / "run-of-it"
    again.mkdir()
    (again / "checkpoints").symlink_to(folder / "checkpoints")
    recorded = json.loads((folder / "checkpoints/step-000002/manifest.json").read_text())["config"]
    recorded |= {"output": str(again)}
    recorded["eval"] |= {"lengths": [400, 800], "windows": 2}
    (place / "same.yaml").write_text(json.dumps(recorded))
    words = ["--config", str(place / "same.yaml"), "--state", "trained"]
    assert evaluate([*words, "--strength", "0.3"]) == 0
    report = EvalReport.read(again / "eval-strength-0.3.json")
    assert report.lengths == losses["a third"]
    assert (
        export_main(["--run", str(folder), "--output", str(place / "hf"), "--format", "merged", "--strength", "0.3"])
        == 0
    )
    assert "merged of 0.3 of step-000002" in capsys.readouterr().out
    read = ["--model", str(place / "hf"), "--text", str(place / "text/val"), "--output", str(place / "read")]
    assert evaluate([*read, "--lengths", "400", "800", "--set", "eval.windows=2"]) == 0
    merged = EvalReport.read(place / "read/eval-shipped.json")
    for one, other in zip(merged.lengths, report.lengths, strict=True):
        assert one.window_nll == pytest.approx(other.window_nll, abs=1e-4)
    assert whole_trained(folder / "checkpoints/step-000002"), "nothing was written there"


def test_what_means_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("1.5", "-0.1", "nan", "half"):
        with pytest.raises(SystemExit):
            export_main(["--run", "r", "--output", "o", "--strength", value])
        assert (
            f"must be a number from 0 (the base) to 1 (all of the training), got '{value}'" in capsys.readouterr().err
        )
    with pytest.raises(SystemExit):
        evaluate(["--config", "x", "--state", "shipped", "--strength", "0.5"])
    assert "--strength is for --state trained and --adapter." in capsys.readouterr().err
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    assert export_main(["--checkpoint", str(tmp_path / "run"), "--output", "o"]) == 2
    assert f"is the folder of a run; give --run {tmp_path / 'run'}, or name one of" in capsys.readouterr().err
    base = make_tiny(tmp_path / "base", "llama2", tokenizer=True)
    dora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, use_dora=True)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), dora).save_pretrained(tmp_path / "dora")
    words = ["--adapter", str(tmp_path / "dora"), "--base", str(base), "--output", str(tmp_path / "o")]
    assert export_main([*words, "--context", "64", "--format", "merged", "--strength", "0.5"]) == 2
    assert "an adapter with DoRA's magnitudes is exported whole" in capsys.readouterr().err
    place = study_place(tmp_path / "study", 400, 1200)
    for wrong, words_of_it in (
        ("{name: x, of: nobody, strength: 0.5}", "recipes[4].of: 'nobody' is no recipe above that trains adapters."),
        ("{name: x, of: untrained, strength: 0.5}", "is no recipe above that trains adapters."),
        ("{name: x, of: trained, strength: 2}", "recipes[4].strength: 2 is not from 0"),
        ("{name: x, of: trained}", "recipes[4].strength: is missing."),
        ("{name: x, of: trained, strength: 0.5, set: {train.lr: 1}}", "recipes[4].set: unknown key"),
    ):
        (place / "wrong.yaml").write_text(f"{STUDY}  - {wrong}\n")
        common = ["--config", str(place / "run.yaml"), "--model", str(place / "base"), "--text", str(place / "text")]
        assert study(["--study", str(place / "wrong.yaml"), *common, "--list"]) == 2
        assert words_of_it in capsys.readouterr().err
