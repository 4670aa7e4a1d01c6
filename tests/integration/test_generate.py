"""`longspan generate` against greedy decoding by hand: the whole text through transformers' model for every token."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.errors import DataError
from pipeline.export.formats import export
from pipeline.export.trained_model import TrainedModel
from tests.integration.test_import_export import by_hand, trained_model, write_checkpoint
from tests.support.tiny_models import make_tiny
from tools.generate import Loaded, continue_prompt, load_folder, load_trained, main, prompt_ids

TEXT = "It is a truth universally acknowledged"
NEW, CHUNK = 6, 16


def greedy(model: TrainedModel, prompt: list[int], eos: int) -> list[int]:
    """No cache, no chunks, none of our export: `by_hand` merges the weights itself."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW:
        likeliest = int(by_hand(model, 2.0, torch.tensor([ids]))[0, -1].argmax())
        if likeliest == eos:
            break
        ids.append(likeliest)
    return ids[len(prompt) :]


def widths(loaded: Loaded) -> list[int]:
    """Filled with the tokens of every pass through the model."""
    seen: list[int] = []

    def note(module: Any, positional: Any, named: Any) -> None:
        seen.append(named["input_ids"].shape[1])

    loaded.model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("kind", ["llama2", "smollm2", "qwen2"])
def test_trained_and_exported_give_the_greedy_tokens(tmp_path: Path, kind: str) -> None:
    trained = trained_model(make_tiny(tmp_path / "base", kind, tokenizer=True))
    export(trained, tmp_path / "merged", "merged")
    for loaded in (load_trained(trained, cpu=True), load_folder(tmp_path / "merged", cpu=True)):
        prompt = prompt_ids(loaded, TEXT, NEW)
        passes = widths(loaded)
        done = continue_prompt(loaded, prompt, NEW, CHUNK)
        assert done.tokens == greedy(trained, prompt, loaded.tokenizer.eos_id) and len(done.tokens) == NEW
        whole, rest = divmod(len(prompt), CHUNK)
        assert passes == [CHUNK] * whole + [rest] * (rest > 0) + [1] * (NEW - 1), "a cache, filled in chunks"


def test_the_end_of_the_text_ends_it(tmp_path: Path) -> None:
    loaded = load_folder(make_tiny(tmp_path / "base", "llama2", tokenizer=True), cpu=True)
    with torch.no_grad():
        loaded.model.lm_head.weight.zero_()

    def end_wins(module: Any, inputs: Any, out: Any) -> None:
        out.logits[..., loaded.tokenizer.eos_id] = 1.0

    loaded.model.register_forward_hook(end_wins)
    assert continue_prompt(loaded, prompt_ids(loaded, TEXT, NEW), NEW, CHUNK).tokens == []


def test_sampling_follows_its_seed(tmp_path: Path) -> None:
    loaded = load_folder(make_tiny(tmp_path / "base", "llama2", tokenizer=True), cpu=True)
    prompt = prompt_ids(loaded, TEXT, NEW)
    one, again, other = (continue_prompt(loaded, prompt, NEW, CHUNK, 5.0, seed).tokens for seed in (1, 1, 2))
    assert one == again != other


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = trained_model(make_tiny(tmp_path / "base", "llama2", tokenizer=True))
    write_checkpoint(trained, tmp_path / "run/checkpoints/step-000012")
    (tmp_path / "run/checkpoints/latest").write_text("step-000012\n")
    loaded = load_trained(trained, cpu=True)
    words = ["--run", str(tmp_path / "run"), "--max-new", str(NEW), "--chunk", str(CHUNK)]
    assert main([*words, "--prompt", TEXT]) == 0
    out, err = capsys.readouterr()
    prompt = prompt_ids(loaded, TEXT, NEW)
    assert out == loaded.tokenizer.decode(greedy(trained, prompt, loaded.tokenizer.eos_id)) + "\n"
    assert f"{len(prompt)} tokens read in" in err and f"{NEW} written" in err

    capsys.readouterr()
    (tmp_path / "latin").write_bytes(b"\xe4")
    for wrong, said in (
        (["--prompt-file", str(tmp_path / "latin")], "is not UTF-8 text"),
        (["--prompt-file", str(tmp_path / "none")], "cannot be used (No such file or directory)"),
        (["--prompt", TEXT, "--temperature", "-1"], "--temperature: must be 0 or more"),
        (["--prompt", "a" * 256], "the model's context of 256 is exceeded"),
    ):
        assert main([*words, *wrong]) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and said in told[0]


def test_no_prompt_at_all_is_told() -> None:
    class Nothing:
        prompt_start: tuple[int, ...] = ()

        def encode(self, text: str) -> list[int]:
            return []

    with pytest.raises(DataError, match="The prompt is empty"):
        prompt_ids(Loaded(None, Nothing(), 8), "", 1)  # type: ignore[arg-type]


def test_a_folder_that_is_no_whole_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = make_tiny(tmp_path / "base", "llama2", tokenizer=True)
    for name in ("cut", "none"):
        shutil.copytree(whole, tmp_path / name)
    file = tmp_path / "cut/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "none/model.safetensors").unlink()
    trained = trained_model(whole)
    export(trained, tmp_path / "adapter", "adapter")
    for name, said in (
        ("cut", "model.safetensors: is truncated or damaged"),
        ("none", "holds no *.safetensors file"),
        ("adapter", "is a PEFT adapter, not a model"),
    ):
        assert main(["--model", str(tmp_path / name), "--prompt", "It", "--max-new", "1"]) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and said in told[0]


@pytest.mark.parametrize("given", [("--strength", "0.5"), ("--rope", "none"), ("--context", "64")])
def test_what_a_model_as_it_is_would_ignore_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--model", str(tmp_path), "--prompt", TEXT, *given])
    assert end.value.code == 2
    assert f"{given[0]}: a --model is taken as it is" in capsys.readouterr().err


def test_a_prompt_too_long_is_told_before_the_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny(tmp_path / "base", "llama2", tokenizer=True)
    monkeypatch.setattr("tools.generate._model_in", lambda folder, cpu: pytest.fail("read"))
    assert main(["--model", str(base), "--prompt", "a" * 10_000]) == 2
    assert "is exceeded" in capsys.readouterr().err
