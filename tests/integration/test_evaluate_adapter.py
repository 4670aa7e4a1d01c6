"""tools.evaluate --adapter: an adapter over its base reads as transformers and PEFT read it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from pipeline.data.tokenizer import load_tokenizer
from pipeline.evaluation.perplexity import EvalReport, cut_windows
from pipeline.export.formats import export
from tests.integration.test_import_export import by_hand, trained_model
from tests.support.tiny_models import make_tiny
from tools.evaluate import main

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a whale and a wife. " * 20
LENGTH, WINDOWS = 48, 3


def losses(base: Path, logits: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
    """Mean of each window, nats."""
    tokenizer = load_tokenizer(base)
    windows = cut_windows(torch.tensor([*tokenizer.encode(TEXT), tokenizer.eos_id]), LENGTH, WINDOWS)
    with torch.no_grad():
        found = logits(windows).float()
    each = functional.cross_entropy(found[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none")
    return each.double().mean(1).tolist()


def test_adapters_of_ours_and_of_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny(tmp_path / "base", "llama2", tokenizer=True)
    (tmp_path / "val.txt").write_text(TEXT)
    common = ["--text", str(tmp_path / "val.txt"), "--lengths", str(LENGTH), "--set", f"eval.windows={WINDOWS}"]

    def measured(name: str, *more: str) -> EvalReport:
        code = main(["--adapter", str(tmp_path / name), "--output", str(tmp_path / f"out-{name}"), *common, *more])
        assert code == 0, capsys.readouterr().err
        return EvalReport.read(tmp_path / f"out-{name}" / "eval-after.json")

    # Ours: trained embedding and norms too, stretched positions, which its own note tells.
    ours = trained_model(base)
    export(ours, tmp_path / "ours", "adapter")
    found = measured("ours")
    assert found.lengths[0].window_nll == pytest.approx(losses(base, lambda ids: by_hand(ours, 2.0, ids)), abs=1e-4)
    assert found.step == ours.step

    # PEFT's own, of some of the matrices.
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings).eval()
    theirs.save_pretrained(tmp_path / "peft")
    want = losses(base, lambda ids: theirs(ids).logits)
    assert measured("peft", "--base", str(base)).lengths[0].window_nll == pytest.approx(want, abs=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for one, other in zip(want, losses(base, lambda ids: plain(ids).logits), strict=True):
        assert abs(one - other) > 1e-3, "the adapter does something"

    # What is computed merged only is not evaluated as something else.
    for number, more in enumerate(({"use_dora": True}, {"alpha_pattern": {"q_proj": 64}})):
        other = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **more)
        fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        peft.get_peft_model(fresh, other).save_pretrained(tmp_path / f"other-{number}")
        words = ["--adapter", str(tmp_path / f"other-{number}"), "--base", str(base), "--output", str(tmp_path / "o")]
        assert main([*words, *common]) == 2
        assert "which is computed merged only; merge it" in capsys.readouterr().err
    assert main(["--adapter", str(tmp_path / "ours"), "--output", str(tmp_path / "o"), *common, "--context", "77"]) == 2
    assert "leave --context out" in capsys.readouterr().err
    shutil.copytree(tmp_path / "peft", tmp_path / "two")
    (tmp_path / "two/trainable_params.bin").write_bytes(b"")
    assert (
        main(["--adapter", str(tmp_path / "two"), "--base", str(base), "--output", str(tmp_path / "o"), *common]) == 2
    )
    assert "--context: is missing" in capsys.readouterr().err

    stranger = make_tiny(tmp_path / "stranger", "llama2", tokenizer=True, intermediate_size=128)
    words = ["--adapter", str(tmp_path / "ours"), "--output", str(tmp_path / "o"), *common, "--base", str(stranger)]
    assert main(words) == 2
    assert str(tmp_path / "ours") in capsys.readouterr().err
    assert main(["--adapter", str(tmp_path), "--output", str(tmp_path / "o"), *common]) == 2
    assert "adapter_config.json: is missing; give a PEFT or LongLoRA adapter folder." in capsys.readouterr().err
    for wrong in (["--model", str(base)], ["--config", "x"], ["--state", "trained"]):
        with pytest.raises(SystemExit):
            main(["--adapter", str(tmp_path / "ours"), "--output", "o", *common, *wrong])
    with pytest.raises(SystemExit):
        main(["--model", str(base), "--base", str(base), "--output", "o", *common])
