"""The name table both ways, and fused layouts against a plain loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.errors import ConfigError
from pipeline.config.sections import LORA_TARGETS, LoraConfig
from pipeline.model.weights.fusing import fuse_gate_up, fuse_qkv
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.tensors import (
    adapter_shapes,
    hf_tensor_shapes,
    is_derived,
    padded_vocab,
    to_hf,
    to_ours,
    tp_slice,
    vocab_range,
)
from tests.support.tiny_models import KINDS, tiny_config


def arch_of(folder: Path, kind: str, **over: Any) -> LlamaArch:
    (folder / "config.json").write_text(json.dumps(tiny_config(kind, **over)))
    return read_arch(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_table_is_two_way(tmp_path: Path, kind: str) -> None:
    arch = arch_of(tmp_path, kind, attention_bias=True, mlp_bias=True)
    shapes = hf_tensor_shapes(arch) | adapter_shapes(arch, LoraConfig(targets=LORA_TARGETS))
    ours = set()
    for name in shapes:
        our_name, part = to_ours(name)
        ours.add(our_name)
        assert (name, part) in to_hf(our_name)
    assert sorted(name for our_name in ours for name, _ in to_hf(our_name)) == sorted(shapes)


def test_some_names_by_hand() -> None:
    assert to_ours("model.layers.11.self_attn.k_proj.lora_B.weight") == (
        "decoder.layers.11.self_attention.linear_qkv.adapters.k.lora_B",
        "k",
    )
    assert to_ours("model.layers.3.post_attention_layernorm.weight") == (
        "decoder.layers.3.pre_mlp_layernorm.weight",
        None,
    )
    assert to_hf("decoder.layers.0.mlp.linear_fc1.weight") == [
        ("model.layers.0.mlp.gate_proj.weight", "gate"),
        ("model.layers.0.mlp.up_proj.weight", "up"),
    ]
    assert is_derived("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not is_derived("model.norm.weight")


@pytest.mark.parametrize("name", ["model.layers.0.foo.weight", "model.layers.x.mlp.up_proj.weight", "transformer.wte"])
def test_unknown_hf_names(name: str) -> None:
    with pytest.raises(KeyError):
        to_ours(name)


@pytest.mark.parametrize(
    "name", ["decoder.layers.0.mlp.linear_fc1.adapters.q.lora_A", "decoder.layers.0.mlp.foo.weight", "embedding.bias"]
)
def test_unknown_names_of_ours(name: str) -> None:
    with pytest.raises(KeyError):
        to_hf(name)


@pytest.mark.parametrize("kind", ["llama2", "llama3", "smollm2", "mistral"])
@pytest.mark.parametrize("rest", [(), (5,)])
def test_fused_rows_follow_kv_groups(tmp_path: Path, kind: str, rest: tuple[int, ...]) -> None:
    arch = arch_of(tmp_path, kind)
    d, per_group = arch.head_dim, arch.heads // arch.kv_heads
    q, k, v = (torch.randn(heads * d, *rest) for heads in (arch.heads, arch.kv_heads, arch.kv_heads))
    rows = []
    for group in range(arch.kv_heads):
        for head in range(group * per_group, (group + 1) * per_group):
            rows.append(q[head * d : (head + 1) * d])
        rows += [k[group * d : (group + 1) * d], v[group * d : (group + 1) * d]]
    fused = fuse_qkv(q, k, v, arch)
    assert torch.equal(fused, torch.cat(rows))
    gate, up = torch.randn(6, *rest), torch.randn(6, *rest)
    both = fuse_gate_up(gate, up)
    assert torch.equal(both[:6], gate) and torch.equal(both[6:], up)


def test_wrong_rows_are_refused(tmp_path: Path) -> None:
    arch = arch_of(tmp_path, "llama3")
    with pytest.raises(ValueError, match="not whole KV groups"):
        fuse_qkv(torch.zeros(16, 2), torch.zeros(32, 2), torch.zeros(32, 2), arch)
    with pytest.raises(ValueError, match="differ in shape"):
        fuse_gate_up(torch.zeros(2, 2), torch.zeros(3, 2))


def test_slices_tile_every_tensor_and_fuse(tmp_path: Path) -> None:
    arch = arch_of(tmp_path, "llama3", attention_bias=True)
    shapes = hf_tensor_shapes(arch) | adapter_shapes(arch, LoraConfig(targets=LORA_TARGETS))
    cut = set()
    for name, shape in shapes.items():
        ranges = [tp_slice(name, arch, rank, 2) for rank in range(2)]
        if ranges[0] is None:
            assert ranges[1] is None
            continue
        cut.add(name.split(".", 3)[-1])
        (dim, start, middle), (dim_1, middle_1, stop) = ranges[0], ranges[1] or (9, 9, 9)
        assert (dim, start, middle, stop) == (dim_1, 0, middle_1, shape[dim])
    assert "self_attn.o_proj.lora_A.weight" in cut and "self_attn.o_proj.lora_B.weight" not in cut
    assert "self_attn.q_proj.lora_B.weight" in cut and "self_attn.q_proj.lora_A.weight" not in cut
    assert "self_attn.q_proj.bias" in cut and "self_attn.o_proj.bias" not in cut
    weights = [torch.randn(shapes[f"model.layers.0.self_attn.{part}_proj.weight"]) for part in "qkv"]
    whole = fuse_qkv(*weights, arch)
    for rank in range(2):
        mine = []
        for part, weight in zip("qkv", weights, strict=True):
            cut_range = tp_slice(f"model.layers.0.self_attn.{part}_proj.weight", arch, rank, 2)
            assert cut_range is not None and cut_range[0] == 0
            mine.append(weight[cut_range[1] : cut_range[2]])
        assert torch.equal(fuse_qkv(*mine, arch), whole.chunk(2)[rank])


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("model.layers.0.self_attn.q_proj.weight", 2, "3 key-value heads"),
        ("model.layers.0.self_attn.v_proj.weight", 2, "3 key-value heads"),
        ("model.layers.0.mlp.down_proj.weight", 5, "96 MLP channels"),
    ],
)
def test_indivisible_slices_are_errors(tmp_path: Path, name: str, size: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tp_slice(name, arch_of(tmp_path, "smollm2"), 0, size)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 127, 200])
def test_vocabulary_slices_tile_it_and_fit_the_padded_rows(tmp_path: Path, size: int) -> None:
    arch = arch_of(tmp_path, "smollm2")
    share = padded_vocab(arch, size) // size
    assert arch.vocab <= share * size < arch.vocab + size
    ranges = [vocab_range(arch, rank, size) for rank in range(size)]
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(arch.vocab))
    assert all(stop - start <= share for start, stop in ranges)
    assert tp_slice("lm_head.weight", arch, 0, size) == (0, *ranges[0])


def test_shapes_of_adapters_and_tied_heads(tmp_path: Path) -> None:
    arch = arch_of(tmp_path, "smollm2")
    assert "lm_head.weight" not in hf_tensor_shapes(arch)
    assert adapter_shapes(arch, LoraConfig(rank=0)) == {}
    shapes = adapter_shapes(arch, LoraConfig(rank=4, targets=("k", "down")))
    assert len(shapes) == 8
    assert shapes["model.layers.1.self_attn.k_proj.lora_B.weight"] == (48, 4)
    assert shapes["model.layers.1.mlp.down_proj.lora_A.weight"] == (4, 96)
