"""One two-way table between Hugging Face's tensor names and ours, their shapes, and the rows each rank holds.

q, k and v share one matrix of ours, and so do gate and up (`model.weights.fusing`). Adapters are never fused: they
keep Hugging Face's row order and one pair of factors a projection. Layer indices are global.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from parallel.errors import ConfigError
from pipeline.config.sections import LoraConfig
from pipeline.planning.arch import LlamaArch

GLOBAL = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
NORMS = {
    "input_layernorm": "input_layernorm",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
}
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
"""Those of single heads, which some families have (`LlamaArch.qk_norm`)."""
PROJECTIONS = {
    "q": ("self_attn.q_proj", "self_attention.linear_qkv"),
    "k": ("self_attn.k_proj", "self_attention.linear_qkv"),
    "v": ("self_attn.v_proj", "self_attention.linear_qkv"),
    "o": ("self_attn.o_proj", "self_attention.linear_proj"),
    "gate": ("mlp.gate_proj", "mlp.linear_fc1"),
    "up": ("mlp.up_proj", "mlp.linear_fc1"),
    "down": ("mlp.down_proj", "mlp.linear_fc2"),
}
"""Part -> (Hugging Face module, our module) inside a layer, in the order parts are fused."""
ROW_PARALLEL = ("o", "down")
"""Parts whose input is sharded under tensor parallelism; the others' output is."""

_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OUR_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_OUR_GLOBAL = {ours: hf for hf, ours in GLOBAL.items()}
_OUR_NORMS = {ours: hf for hf, ours in NORMS.items()}
_HF_MODULES = {hf: part for part, (hf, _) in PROJECTIONS.items()}


def is_derived(hf_name: str) -> bool:
    """True of tensors some old checkpoints store although they are computed (RoPE's inverse frequencies)."""
    return hf_name.endswith("rotary_emb.inv_freq")


def _split_hf(hf_name: str) -> tuple[str, str, str] | None:
    """(layer, part, leaf) of a projection's tensor; leaf is weight, bias, lora_A or lora_B."""
    match = _HF_LAYER.fullmatch(hf_name)
    if match is None:
        return None
    layer, rest = match.groups()
    for suffix, leaf in (
        (".lora_A.weight", "lora_A"),
        (".lora_B.weight", "lora_B"),
        (".weight", "weight"),
        (".bias", "bias"),
    ):
        part = _HF_MODULES.get(rest.removesuffix(suffix)) if rest.endswith(suffix) else None
        if part is not None:
            return layer, part, leaf
    return None


def to_ours(hf_name: str) -> tuple[str, str | None]:
    """Our parameter holding a Hugging Face tensor, and which part of it (q, k, v, o, gate, up, down; None: no
    projection).

    Raises:
        KeyError: no parameter of ours has this name.
    """
    if hf_name in GLOBAL:
        return GLOBAL[hf_name], None
    projection = _split_hf(hf_name)
    if projection is not None:
        layer, part, leaf = projection
        inner = f"adapters.{part}.{leaf}" if leaf.startswith("lora") else leaf
        return f"decoder.layers.{layer}.{PROJECTIONS[part][1]}.{inner}", part
    match = _HF_LAYER.fullmatch(hf_name)
    norm = NORMS.get(match.group(2).removesuffix(".weight")) if match and hf_name.endswith(".weight") else None
    if match is None or norm is None:
        raise KeyError(hf_name)
    return f"decoder.layers.{match.group(1)}.{norm}.weight", None


def to_hf(our_name: str) -> list[tuple[str, str | None]]:
    """The Hugging Face tensors a parameter of ours holds, in fused order, each with its part.

    Raises:
        KeyError: not a name of ours.
    """
    if our_name in _OUR_GLOBAL:
        return [(_OUR_GLOBAL[our_name], None)]
    match = _OUR_LAYER.fullmatch(our_name)
    if match is None:
        raise KeyError(our_name)
    prefix, rest = f"model.layers.{match.group(1)}.", match.group(2)
    module, _, leaf = rest.rpartition(".")
    if leaf == "weight" and module in _OUR_NORMS:
        return [(f"{prefix}{_OUR_NORMS[module]}.weight", None)]
    if leaf in ("lora_A", "lora_B"):
        owner, _, part = module.rpartition(".adapters.")
        if part in PROJECTIONS and PROJECTIONS[part][1] == owner:
            return [(f"{prefix}{PROJECTIONS[part][0]}.{leaf}.weight", part)]
    elif leaf in ("weight", "bias"):
        found = [(f"{prefix}{hf}.{leaf}", part) for part, (hf, ours) in PROJECTIONS.items() if ours == module]
        if found:
            return [(name, part) for name, part in found]
    raise KeyError(our_name)


def projection_shape(part: str, arch: LlamaArch) -> tuple[int, int]:
    """(output rows, input columns) of a projection."""
    heads, kv_heads = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    return {
        "q": (heads, arch.hidden),
        "k": (kv_heads, arch.hidden),
        "v": (kv_heads, arch.hidden),
        "o": (arch.hidden, heads),
        "gate": (arch.ffn, arch.hidden),
        "up": (arch.ffn, arch.hidden),
        "down": (arch.hidden, arch.ffn),
    }[part]


def norm_elements(arch: LlamaArch) -> int:
    """Weights of all norms of a whole model."""
    of_heads = len(HEAD_NORMS) * arch.head_dim if arch.qk_norm else 0
    return (2 * arch.layers + 1) * arch.hidden + arch.layers * of_heads


def has_bias(part: str, arch: LlamaArch) -> bool:
    """Whether a projection of this architecture has a bias, one value a row."""
    if part in ("q", "k", "v"):
        return arch.attention_bias
    return arch.o_bias if part == "o" else arch.mlp_bias


def hf_tensor_shapes(arch: LlamaArch) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a full checkpoint, in the model's order (`lm_head.weight` only when untied)."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (arch.vocab, arch.hidden)}
    for layer in range(arch.layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (arch.hidden,)
        for part, (module, _) in PROJECTIONS.items():
            if part == "o" and arch.qk_norm:
                shapes |= {f"{prefix}{norm}.weight": (arch.head_dim,) for norm in HEAD_NORMS}
            if part == "gate":
                shapes[f"{prefix}post_attention_layernorm.weight"] = (arch.hidden,)
            rows, columns = projection_shape(part, arch)
            shapes[f"{prefix}{module}.weight"] = (rows, columns)
            if has_bias(part, arch):
                shapes[f"{prefix}{module}.bias"] = (rows,)
    shapes["model.norm.weight"] = (arch.hidden,)
    if not arch.tied:
        shapes["lm_head.weight"] = (arch.vocab, arch.hidden)
    return shapes


def adapter_shapes(arch: LlamaArch, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every adapter tensor: A [r, in], B [out, r]; empty at rank 0."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(arch.layers if lora.rank else 0):
        for part, (module, _) in PROJECTIONS.items():
            if part in lora.targets:
                rows, columns = projection_shape(part, arch)
                shapes[f"model.layers.{layer}.{module}.lora_A.weight"] = (lora.rank, columns)
                shapes[f"model.layers.{layer}.{module}.lora_B.weight"] = (rows, lora.rank)
    return shapes


def padded_vocab(arch: LlamaArch, tp_size: int) -> int:
    """Vocabulary rows allocated over all tensor-parallel ranks: the next multiple of their number."""
    return -(-arch.vocab // tp_size) * tp_size


def vocab_range(arch: LlamaArch, tp_rank: int, tp_size: int) -> tuple[int, int]:
    """[start, stop) of the vocabulary rows a rank holds; its allocated rows beyond are padding, never saved."""
    share = padded_vocab(arch, tp_size) // tp_size
    return min(tp_rank * share, arch.vocab), min((tp_rank + 1) * share, arch.vocab)


def _even_range(size: int, unit: int, what: str, rank: int, world: int) -> tuple[int, int]:
    """[start, stop) of a rank's equal share of `size` things of `unit` rows each."""
    if size % world:
        raise ConfigError(
            f"parallel.tp: {world} does not divide the checkpoint's {size} {what}; choose a divisor of {size}."
        )
    share = size // world * unit
    return rank * share, (rank + 1) * share


def tp_slice(hf_name: str, arch: LlamaArch, tp_rank: int, tp_size: int) -> tuple[int, int, int] | None:
    """The slice (dim, start, stop) of a Hugging Face tensor that tensor-parallel rank `tp_rank` holds; None: all of it.

    Cuts whole heads (q by query heads, k and v by KV heads), so fusing a rank's slices gives that rank's fused weight.
    The last slices of a vocabulary that does not divide are shorter than what is allocated.

    Raises:
        ConfigError: something to be cut does not divide by `tp_size`.
        KeyError: not a tensor of the model.
    """
    to_ours(hf_name)
    if hf_name in ("model.embed_tokens.weight", "lm_head.weight"):
        return 0, *vocab_range(arch, tp_rank, tp_size)
    projection = _split_hf(hf_name)
    if projection is None:
        return None
    _, part, leaf = projection
    row_parallel = part in ROW_PARALLEL
    if leaf == ("lora_B" if row_parallel else "lora_A") or (row_parallel and leaf == "bias"):
        return None
    cuts: dict[str, tuple[int, int, str]] = {
        "q": (arch.heads, arch.head_dim, "attention heads"),
        "k": (arch.kv_heads, arch.head_dim, "key-value heads"),
        "o": (arch.heads, arch.head_dim, "attention heads"),
        "mlp": (arch.ffn, 1, "MLP channels"),
    }
    size, unit, what = cuts[{"v": "k"}.get(part, part) if part in ("q", "k", "v", "o") else "mlp"]
    if part in ("q", "o"):
        # Query heads travel with their KV group.
        _even_range(arch.kv_heads, arch.head_dim, "key-value heads", tp_rank, tp_size)
    return (1 if row_parallel else 0), *_even_range(size, unit, what, tp_rank, tp_size)


@dataclass(frozen=True)
class RowRun:
    """Consecutive rows of a rank's matrix that lie as consecutive rows in one stored tensor."""

    row: int
    """First row in the rank's matrix."""
    count: int
    hf_name: str
    source: int
    """First row in the stored tensor."""
    columns: tuple[int, int] | None
    """[start, stop) of the stored columns the rank holds; None: all."""


def row_runs(our_name: str, arch: LlamaArch, tp_rank: int, tp_size: int) -> list[RowRun]:
    """Where every row of a rank's weight matrix comes from, in its row order; vocabulary padding comes from nowhere."""
    found: list[RowRun] = []
    pieces = []
    for hf_name, part in to_hf(our_name):
        cut = tp_slice(hf_name, arch, tp_rank, tp_size) if tp_size > 1 else None
        columns = cut[1:] if cut is not None and cut[0] == 1 else None
        if part is None:
            first, last = vocab_range(arch, tp_rank, tp_size)
        else:
            first, last = cut[1:] if cut is not None and cut[0] == 0 else (0, projection_shape(part, arch)[0])
        pieces.append((hf_name, columns, first, last))
    # Only q, k and v interleave: a group of query heads, then its key and its value head.
    groups = arch.kv_heads // tp_size if len(pieces) == 3 else 1
    row = 0
    for group in range(groups):
        for hf_name, columns, first, last in pieces:
            count = (last - first) // groups
            found.append(RowRun(row, count, hf_name, first + group * count, columns))
            row += count
    return found
