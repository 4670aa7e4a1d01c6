"""Folders that only an import reads: Phi-3's fused projections and pickled weights, made by transformers and torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from parallel.errors import CheckpointError, ConfigError, LongspanError
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.planning.arch import read_arch
from pipeline.planning.attention_layout import SequenceLayout
from pipeline.storage.pickled import read_pickled
from tests.numerics.test_model_parity import FULL, stage_of
from tests.support.tiny_models import make_tiny
from tools.import_hf import import_model

TOKENS = torch.randint(0, 120, (2, 24), generator=torch.Generator().manual_seed(5))


def phi3(folder: Path, **over: Any) -> Phi3ForCausalLM:
    """A random one as transformers writes it, in folder."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 120}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = Phi3Config(**{**sizes, **heads, "pad_token_id": 0, "eos_token_id": 2, **over})
    model = Phi3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # its own start is nearly linear
    model.save_pretrained(folder)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def refused(source: Path, kind: type[LongspanError]) -> str:
    with pytest.raises(kind) as caught:
        import_model(source, source.parent / "refused")
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and not (source.parent / "refused").exists()
    return message


@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("pickled", [False, True])
def test_phi3_becomes_the_same_model(tmp_path: Path, window: int | None, pickled: bool) -> None:
    want = logits(phi3(tmp_path / "phi", sliding_window=window))
    if pickled:
        torch.save(load_file(tmp_path / "phi/model.safetensors"), tmp_path / "phi/pytorch_model.bin")
        (tmp_path / "phi/model.safetensors").unlink()
    import_model(tmp_path / "phi", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == ("LlamaForCausalLM" if window is None else "MistralForCausalLM")
    assert read_arch(tmp_path / "out").sliding_window == window
    scale = want.abs().max()
    assert scale > 1 and (logits(theirs) - want).abs().max() <= 1e-5 * scale
    found = stage_of(tmp_path / "out").logits(TOKENS, SequenceLayout.dense(2, 24), FULL)
    assert (found - want).abs().max() <= 1e-5 * scale
    # Beyond a window too, where nothing here computes.
    long = TOKENS.repeat(1, 2)
    with torch.no_grad():
        beyond = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(long).logits
        assert (beyond - phi3(tmp_path / "again", sliding_window=window)(long).logits).abs().max() <= 1e-5 * scale


def test_phi3_that_is_no_llama_is_refused(tmp_path: Path) -> None:
    phi3(tmp_path / "phi")
    path = tmp_path / "phi/config.json"
    own = json.loads(path.read_text())
    with pytest.raises(ConfigError, match="keeps projections fused; make the same model .* with longspan import"):
        read_arch(tmp_path / "phi")

    def change(**fields: Any) -> None:
        path.write_text(json.dumps({**own, **fields}))

    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32}
    for key, kind in (("rope_scaling", {"type": "longrope"}), ("rope_parameters", {"rope_type": "longrope"})):
        change(**{key: {**kind, **factors}})
        assert "its RoPE is longrope, which turns by other angles" in refused(tmp_path / "phi", ConfigError)
    change(partial_rotary_factor=0.75, rope_parameters=None)
    assert "partial_rotary_factor other than 1 is not supported" in refused(tmp_path / "phi", ConfigError)
    change(num_key_value_heads=4)
    assert "has no tensor model.layers.0.self_attn.q_proj.weight" in refused(tmp_path / "phi", CheckpointError)


def test_pickled_weights_are_read_by_import_alone(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "smollm2", dtype=torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # one storage, as torch saves a tied model
    names = sorted(tensors)
    files = {f"pytorch_model-{i + 1:05d}-of-00002.bin": names[i::2] for i in range(2)}
    for file, held in files.items():
        torch.save({name: tensors[name] for name in held}, base / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"pickled weights only, .*with longspan import"):
        HfCheckpoint(base)
    import_model(base, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    del tensors["lm_head.weight"]
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    (base / next(iter(files))).unlink()
    assert "is missing (1 of 2 shards are); download it again" in refused(base, CheckpointError)


class _Runs:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = make_tiny(tmp_path / "base", "llama2")
    (base / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(64), "more": _Runs()}, base / "pytorch_model.bin")
    assert "is no plain torch.save of tensors, so it is not read" in refused(base, CheckpointError)
    assert not Path("ran").exists()
    with pytest.raises(CheckpointError, match="no plain torch.save"):
        read_pickled(base / "pytorch_model.bin")
