"""Wherever a tokenizer and an embedding's rows meet, they must fit; rows that PEFT keeps singly come out as it has
them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from parallel.errors import CheckpointError
from pipeline.export.adapter_read import load_adapter
from pipeline.export.formats import FORMATS, export
from pipeline.hf.companions import tokenizer_size
from tests.integration.test_import_export import trained_model, write_checkpoint
from tests.integration.test_longlora_files import CONTEXT, published
from tests.support.tiny_models import VOCAB, make_tiny, write_tokenizer
from tools.export_hf import main as export_main
from tools.import_hf import main as import_main
from tools.merge_lora import main as merge_main
from tools.prepare_data import main as prepare_main

WEIGHTS = "adapter_model.safetensors"


def add_tokens(folder: Path, *tokens: str) -> int:
    """Have transformers add tokens to a folder's tokenizer; returns how many it then has."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(token) for token in tokens])
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def refused(folder: Path, base: Path, context: int | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_adapter(folder, base, context)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


def test_sizes_are_those_that_transformers_counts(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, VOCAB)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert tokenizer_size(tmp_path) == len(AutoTokenizer.from_pretrained(tmp_path)) == VOCAB
    assert add_tokens(tmp_path, "<x>", "<y>") == VOCAB + 2 == tokenizer_size(tmp_path)
    # Told in tokenizer_config.json only.
    write_tokenizer(tmp_path, VOCAB)
    path = tmp_path / "tokenizer_config.json"
    entry = {"content": "<z>", "special": False}
    entry |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens_decoder": {str(VOCAB): entry}}))
    assert tokenizer_size(tmp_path) == len(AutoTokenizer.from_pretrained(tmp_path)) == VOCAB + 1
    for broken in ("{}", '{"model": {"vocab": {}}}', '{"model": {"vocab": 3}}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        path.write_text("{}")
        with pytest.raises(CheckpointError, match=r"tokenizer.json: tells no token ids .*; copy the model's tokenizer"):
            tokenizer_size(tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_more_tokens_than_rows_are_refused_everywhere(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    write_tokenizer(base, VOCAB)
    model = trained_model(base)
    export(model, tmp_path / "good", form)
    if form != "merged":
        add_tokens(tmp_path / "good", "<x>")
        words = f"{tmp_path / 'good'}: its tokenizer has {VOCAB + 1} tokens and the embedding {VOCAB} rows"
        assert words in refused(tmp_path / "good", base)
        assert merge_main(["--adapter", str(tmp_path / "good"), "--output", str(tmp_path / "out")]) != 0
        assert words in capsys.readouterr().err
    add_tokens(base, "<x>", "<y>")
    words = f"{base}: its tokenizer has {VOCAB + 2} tokens and the embedding {VOCAB} rows"
    with pytest.raises(CheckpointError, match=words):
        export(model, tmp_path / "out", form)
    write_checkpoint(model, tmp_path / "checkpoint")
    arguments = ["--checkpoint", str(tmp_path / "checkpoint"), "--format", form, "--output", str(tmp_path / "out")]
    assert export_main(arguments) != 0 and words in capsys.readouterr().err
    assert import_main([str(base), str(tmp_path / "out")]) != 0
    assert words in (said := capsys.readouterr().err) and "model.vocab" in said
    assert not (tmp_path / "out").exists()
    (tmp_path / "t.txt").write_text("text")
    arguments = ["--input", str(tmp_path / "t.txt"), "--output", str(tmp_path / "tokens"), "--tokenizer", str(base)]
    assert prepare_main(arguments) == 0
    assert f"warning: data.tokenizer: has {VOCAB + 2} tokens, the model {VOCAB}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "settings", "whole"),
    [
        ("llama2", {"trainable_token_indices": [3, 128, 129]}, True),
        ("llama2", {"trainable_token_indices": {"embed_tokens": [128, 129], "lm_head": [129]}}, True),
        ("llama2", {"trainable_token_indices": {"embed_tokens": [128, 129], "lm_head": [2, 128, 129]}}, False),
        ("llama2", {"trainable_token_indices": [129], "modules_to_save": ["lm_head"]}, True),
        ("smollm2", {"trainable_token_indices": [129, 5]}, True),
        ("smollm2", {"trainable_token_indices": [129, 5, 128]}, False),
    ],
)
def test_single_rows_of_a_grown_vocabulary_merge_to_pefts_logits(
    tmp_path: Path, kind: str, settings: dict[str, Any], whole: bool
) -> None:
    """PEFT keeps single rows beside the resized matrix, or, told not to save that, alone."""
    base = make_tiny(tmp_path / "base", kind)
    write_tokenizer(base, VOCAB)
    network = AutoModelForCausalLM.from_pretrained(base)
    network.resize_token_embeddings(VOCAB + 2)
    network = get_peft_model(network, PeftLora(r=4, lora_alpha=8, target_modules=["v_proj"], **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    network.save_pretrained(adapter, save_embedding_layers="auto" if whole else False)
    assert any("base_layer" in name for name in load_file(adapter / WEIGHTS)) == whole
    assert merge_main(["--adapter", str(adapter), "--output", str(out)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.arange(VOCAB + 2)[None, -64:]
    with torch.no_grad():
        want, found = network.eval()(tokens).logits, merged(tokens).logits
    assert found.shape == want.shape and (found - want).abs().max() <= 1e-4 * max(1.0, want.abs().max().item())
    # Whose rows these are, nobody said: the tokenizer stays as it was.
    assert len(AutoTokenizer.from_pretrained(out)) == VOCAB and AutoTokenizer.from_pretrained(out).pad_token is None


def test_rows_of_which_not_all_were_saved(tmp_path: Path) -> None:
    """Without the resized matrices the rows that were not trained, or those of the output, are nowhere."""
    for kind, rows, words in (
        ("llama2", [128, 129], "has 2 rows for added tokens and none of lm_head.weight for them"),
        ("smollm2", [129], "trainable_token_indices do not fit the 1 rows kept of model.embed_tokens.weight"),
    ):
        base = make_tiny(tmp_path / kind, kind)
        network = AutoModelForCausalLM.from_pretrained(base)
        network.resize_token_embeddings(VOCAB + 2)
        settings = PeftLora(r=4, lora_alpha=8, target_modules=["v_proj"], trainable_token_indices=rows)
        adapter = tmp_path / f"{kind}-adapter"
        get_peft_model(network, settings).save_pretrained(adapter, save_embedding_layers=False)
        said = refused(adapter, base)
        assert words in said and "save_embedding_layers=True" in said


def test_a_row_that_somebody_else_added_gets_no_name(tmp_path: Path) -> None:
    """One row more is LongLoRA's `[PAD]` in LongLoRA's two files, and otherwise the token of whoever added it."""
    base = make_tiny(tmp_path / "base", "llama2")
    write_tokenizer(base, VOCAB)
    theirs = load_adapter(published(tmp_path / "published", base, True), base, CONTEXT)
    export(theirs, tmp_path / "out", "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("[PAD]") == VOCAB
    network = AutoModelForCausalLM.from_pretrained(base)
    network.resize_token_embeddings(VOCAB + 1)
    settings = PeftLora(r=4, lora_alpha=8, target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(network, settings).save_pretrained(tmp_path / "peft")
    export(load_adapter(tmp_path / "peft", base), tmp_path / "other", "merged")
    assert "[PAD]" not in AutoTokenizer.from_pretrained(tmp_path / "other").get_vocab()
    # A run that was trained with a tokenizer of its own: that one is exported, with its token.
    shutil.copytree(base, tmp_path / "named")
    assert add_tokens(tmp_path / "named", "<sep>") == VOCAB + 1
    small = trained_model(base)
    rows = torch.cat((small.trained["model.embed_tokens.weight"], torch.full((1, small.arch.hidden), 0.5)))
    arch = replace(small.arch, vocab=VOCAB + 1)
    model = replace(small, arch=arch, trained={**small.trained, "model.embed_tokens.weight": rows})
    for form in FORMATS:
        export(replace(model, tokenizer=tmp_path / "named", names_pad=False), tmp_path / form, form)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / form)
        assert tokenizer.convert_tokens_to_ids("<sep>") == VOCAB and "[PAD]" not in tokenizer.get_vocab()


def test_the_run_tells_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    write_tokenizer(base, VOCAB)
    shutil.copytree(base, tmp_path / "own")
    add_tokens(tmp_path / "own", "<sep>")
    small = trained_model(base)
    rows = torch.cat((small.trained["model.embed_tokens.weight"], torch.full((1, small.arch.hidden), 0.5)))
    arch = replace(small.arch, vocab=VOCAB + 1)
    model = replace(small, arch=arch, trained={**small.trained, "model.embed_tokens.weight": rows})
    note = write_checkpoint(model, tmp_path / "checkpoint") / "manifest.json"
    manifest = json.loads(note.read_text())
    manifest["config"]["model"]["vocab"] = VOCAB + 1
    manifest["config"]["data"] = {"tokenizer": str(tmp_path / "own")}
    note.write_text(json.dumps(manifest))
    arguments = ["--checkpoint", str(tmp_path / "checkpoint"), "--format", "merged", "--output"]
    assert export_main([*arguments, str(tmp_path / "a")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "a").convert_tokens_to_ids("<sep>") == VOCAB
    capsys.readouterr()
    shutil.rmtree(tmp_path / "own")
    assert export_main([*arguments, str(tmp_path / "b")]) == 0
    assert f"warning: data.tokenizer: {tmp_path / 'own'} is gone, so the base's" in capsys.readouterr().err
    assert len(AutoTokenizer.from_pretrained(tmp_path / "b")) == VOCAB


def test_files_of_an_adapter_that_are_empty_or_contradict(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "llama2")
    adapter = published(tmp_path / "adapter", base, False)
    rest, factors = adapter / "trainable_params.bin", adapter / "adapter_model.bin"
    good = {path: torch.load(path, weights_only=True) for path in (rest, factors)}
    torch.save({}, rest)
    assert "its trainable_params file holds no tensor, so what was trained beside LoRA is lost" in refused(
        adapter, base, CONTEXT
    )
    torch.save(good[rest], rest)
    load_adapter(adapter, base, CONTEXT)
    # As save_pretrained leaves them under ZeRO-3, whose parameters are empty between uses.
    for path, part in ((factors, "v_proj.lora_A"), (rest, "embed_tokens")):
        torch.save({n: t[:0, 0] if part in n else t for n, t in good[path].items()}, path)
        said = refused(adapter, base, CONTEXT)
        assert part in said and "has no elements, as after saving under DeepSpeed ZeRO-3 without gathering" in said
        torch.save(good[path], path)
    # The same twice, as an export of ours has them, is one; two that differ are not.
    for path in (factors, rest):
        save_file(good[path], path.with_suffix(".safetensors"))
    load_adapter(adapter, base, CONTEXT)
    for path in (factors, rest):
        other = {name: tensor + 1 for name, tensor in good[path].items()}
        save_file(other, path.with_suffix(".safetensors"))
        said = refused(adapter, base, CONTEXT)
        assert f"{path.with_suffix('.safetensors')}: holds other tensors than {path.name} beside it" in said
        save_file(good[path], path.with_suffix(".safetensors"))
    # Nothing but LoRA was trained, and the export says so itself.
    export(trained_model(base, kinds=()), tmp_path / "ours", "longlora")
    assert load_adapter(tmp_path / "ours").arch.vocab == VOCAB


def test_no_export_asks_for_code(tmp_path: Path) -> None:
    """`auto_map` names classes in files that are not copied: transformers refused to load the result without them."""
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own", "AutoTokenizer": ["own.Own", None]}}
    base = make_tiny(tmp_path / "base", "llama2", tokenizer=True, **code)
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **code}))
    assert import_main([str(base), str(tmp_path / "imported")]) == 0
    model = trained_model(base)
    for form in FORMATS:
        export(model, tmp_path / form, form)
    for name in ("imported", *FORMATS):
        for file in ("config.json", "tokenizer_config.json"):
            assert "auto_map" not in json.loads((tmp_path / name / file).read_text())
        assert AutoTokenizer.from_pretrained(tmp_path / name).encode("ab")
    for name in ("imported", "merged"):
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
