"""A GGUF file, as llama.cpp writes one (quantized, q and k rows interleaved), becomes the folder it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pipeline.data.tokenizer import load_tokenizer
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.planning.arch import read_arch
from pipeline.planning.tensors import hf_tensor_shapes, is_derived
from tests.support.tiny_models import make_tiny
from tools.import_hf import main

NAMES = {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
Q8 = gguf.GGMLQuantizationType.Q8_0


def gguf_name(name: str) -> str:
    name = name.replace("model.layers.", "blk.")
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring channels: its converter reorders the rows of q and k."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    base: Path, file: Path, without: str = "", more: Callable[[gguf.GGUFWriter], Any] = lambda writer: None
) -> dict[str, torch.Tensor]:
    """Write the tiny checkpoint `base` as 8-bit GGUF; returns the weights it then holds, under their own names.

    Args:
        without: a tensor of `base` that is left out.
        more: adds what it likes.
    """
    arch = read_arch(base)
    writer = gguf.GGUFWriter(file, "qwen3" if arch.qk_norm else "llama")
    if arch.qk_norm:
        writer.add_key_length(arch.head_dim)
        writer.add_value_length(arch.head_dim)
    writer.add_context_length(arch.max_positions)
    writer.add_embedding_length(arch.hidden)
    writer.add_block_count(arch.layers)
    writer.add_feed_forward_length(arch.ffn)
    writer.add_head_count(arch.heads)
    writer.add_head_count_kv(arch.kv_heads)
    writer.add_layer_norm_rms_eps(arch.norm_eps)
    writer.add_rope_freq_base(arch.rope_theta)
    writer.add_rope_dimension_count(arch.head_dim)
    writer.add_vocab_size(arch.vocab)
    letters = [chr(code) for code in range(33, 127)]
    extra = (f"<extra{i}>" for i in range(arch.vocab - 4 - len(letters)))
    tokens = ["<unk>", "<s>", "</s>", *letters, "ab", *extra]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    kept = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name == without:
            continue
        values = tensor.numpy()
        if not arch.qk_norm and ("q_proj" in name or "k_proj" in name):
            values = interleaved(values, arch.heads if "q_proj" in name else arch.kv_heads)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
            kept[name] = tensor
        else:
            packed = quantize(values, Q8)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=Q8)
            exact = quantize(tensor.numpy(), Q8)  # blocks lie along a row, so reordered rows keep their values
            kept[name] = torch.from_numpy(dequantize(exact, Q8))
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


@pytest.mark.parametrize(("kind", "tied"), [("llama3", False), ("llama3", True), ("qwen3", True)])
def test_a_gguf_file_gives_back_its_model(
    kind: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of Qwen3 transformers reads no width of heads: it is 128 in every release.
    width = {"head_dim": 128} if kind == "qwen3" else {}
    base = make_tiny(tmp_path / "base", kind, tie_word_embeddings=tied, rope_scaling=None, rms_norm_eps=1e-5, **width)
    expected = write_gguf(base, tmp_path / "tiny.gguf")
    assert main([str(tmp_path / "tiny.gguf"), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    arch, own = read_arch(tmp_path / "out"), read_arch(base)
    for size in ("hidden", "ffn", "layers", "heads", "kv_heads", "head_dim", "vocab", "max_positions", "tied"):
        assert getattr(arch, size) == getattr(own, size), size
    assert (arch.rope_theta, arch.rope_scaling, arch.norm_eps) == (own.rope_theta, None, pytest.approx(1e-5))
    found = HfCheckpoint(tmp_path / "out")
    found.check(hf_tensor_shapes(arch), is_derived)
    for name, tensor in expected.items():
        assert torch.equal(found.tensor(name), tensor), name
        assert tensor.abs().max() > 0.1
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.eos_id == 2 and tokenizer.encode("abc!")


def test_special_tokens_are_the_files_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.17 takes another token for the end of a text than the file says: answers did not end there."""
    base = make_tiny(tmp_path / "base", "llama3", rope_scaling=None, rms_norm_eps=1e-5)
    write_gguf(base, tmp_path / "tiny.gguf", more=lambda writer: writer.add_pad_token_id(0))
    read = AutoTokenizer.from_pretrained

    def mistaken(*args: Any, **kwargs: Any) -> Any:
        tokenizer = read(*args, **kwargs)
        tokenizer.eos_token, tokenizer.pad_token = "<s>", None
        return tokenizer

    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", mistaken)
        assert main([str(tmp_path / "tiny.gguf"), str(tmp_path / "out")]) == 0
    found = read(tmp_path / "out")
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<s>", "</s>", "<unk>")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_special_token_that_is_none_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of -1 the vocabulary's last token became the padding; of one beyond it no sentence said what is wrong."""
    base = make_tiny(tmp_path / "base", "llama3", rope_scaling=None, rms_norm_eps=1e-5)
    write_gguf(base, tmp_path / "no.gguf", more=lambda writer: writer.add_int32("tokenizer.ggml.padding_token_id", -1))
    assert main([str(tmp_path / "no.gguf"), str(tmp_path / "out")]) == 0
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<s>", "</s>", None)
    assert json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"] is None

    write_gguf(base, tmp_path / "beyond.gguf", more=lambda writer: writer.add_pad_token_id(2**32 - 1))
    assert main([str(tmp_path / "beyond.gguf"), str(tmp_path / "other")]) == 2
    assert "padding_token_id is 4294967295, and it has 128 tokens" in capsys.readouterr().err


def add_rope(writer: gguf.GGUFWriter, kind: gguf.RopeScalingType, factor: float) -> None:
    writer.add_rope_scaling_type(kind)
    writer.add_rope_scaling_factor(factor)


def divide(writer: gguf.GGUFWriter, by: float) -> None:
    writer.add_tensor("rope_freqs.weight", np.array([1, 1, 1, 1, by, by, by, by], dtype=np.float32))


@pytest.mark.parametrize(
    ("without", "more", "words"),
    [
        ("model.layers.1.self_attn.q_proj.weight", lambda w: None, "lacks blk.1.attn_q.weight; it is incomplete"),
        ("model.layers.0.input_layernorm.weight", lambda w: None, "lacks blk.0.attn_norm.weight; it is incomplete"),
        ("", lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)), "holds blk.0.attn_q.bias, which"),
        ("", lambda w: add_rope(w, gguf.RopeScalingType.LINEAR, 4.0), "RoPE is scaled (llama.rope.scaling.type)"),
        ("", lambda w: add_rope(w, gguf.RopeScalingType.YARN, 4.0), "RoPE is scaled (llama.rope.scaling.type)"),
        ("", lambda w: add_rope(w, gguf.RopeScalingType.NONE, 4.0), "RoPE is scaled (llama.rope.scaling.factor)"),
        ("", lambda w: divide(w, 8.0), "RoPE is scaled (rope_freqs.weight)"),
    ],
)
def test_what_transformers_leaves_out_of_a_gguf_file_is_refused(
    tmp_path: Path,
    without: str,
    more: Callable[[gguf.GGUFWriter], Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It gives random values to a tensor that is missing, and plain RoPE to a model without."""
    base = make_tiny(tmp_path / "base", "llama3", rope_scaling=None)
    write_gguf(base, tmp_path / "tiny.gguf", without, more)
    assert main([str(tmp_path / "tiny.gguf"), str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_scaling_by_one_is_none(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "llama3", rope_scaling=None)

    def more(writer: gguf.GGUFWriter) -> None:
        add_rope(writer, gguf.RopeScalingType.NONE, 1.0)
        divide(writer, 1.0)

    write_gguf(base, tmp_path / "tiny.gguf", more=more)
    assert main([str(tmp_path / "tiny.gguf"), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_gguf_file_is_finite_once_cast(tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny(tmp_path / "base", "llama3", rope_scaling=None)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, base / "model.safetensors")
    write_gguf(base, tmp_path / "tiny.gguf")
    status = main([str(tmp_path / "tiny.gguf"), str(tmp_path / "out"), "--dtype", dtype])
    assert status == (2 if dtype == "fp16" else 0)
    assert ("model.norm.weight holds 1e+06, more than float16 can" in capsys.readouterr().err) == (dtype == "fp16")
