"""The trained model's logits by this product's own mathematics: what an export is held against.

Nothing here reads the export or asks transformers: sizes and constants are the trainer's (`LlamaArch` of the base), the
angles its `rope_tables`, the weights the base's with training applied by hand. That these formulas are those of the
model that trains (`LlamaChunk`) is tested; they are written out in plain torch because an export runs in one process
on a CPU, one layer at a time, and with the sums in the order in which transformers takes them: a deep model amplifies a
last-place difference a thousandfold on random tokens, so another order would need a tolerance that hides real faults.

Shapes: B batch, S tokens, H heads, D head width, W width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear, silu

from pipeline.export.trained_model import TrainedModel
from pipeline.model.layers.rotary import apply_rope, rope_tables
from pipeline.planning.arch import LlamaArch
from pipeline.planning.tensors import hf_tensor_shapes

Weight = Callable[[str], torch.Tensor]
"""Canonical name -> tensor, in any dtype."""


def _norm(x_BSW: torch.Tensor, weight_W: torch.Tensor, eps: float) -> torch.Tensor:
    return weight_W.float() * (x_BSW * torch.rsqrt(x_BSW.pow(2).mean(-1, keepdim=True) + eps))


class _Layer:
    """One layer's weights, read when used."""

    def __init__(self, model: TrainedModel, number: int, weight: Weight, apart: bool) -> None:
        self.model, self.prefix, self.weight, self.apart = model, f"model.layers.{number}.", weight, apart
        self.shapes = hf_tensor_shapes(model.arch)

    def product(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """A linear layer of this model, its adapter included."""
        name = self.prefix + module
        bias = self.weight(f"{name}.bias").float() if f"{name}.bias" in self.shapes else None
        out = linear(x, self.weight(f"{name}.weight").float(), bias)
        if self.apart and f"{name}.lora_A.weight" in self.model.trained:
            low, high = (self.model.trained[f"{name}.lora_{side}.weight"].float() for side in "AB")
            out = out + linear(linear(x, low), high) * self.model.lora.scale
        return out

    def norm(self, module: str, x_BSW: torch.Tensor) -> torch.Tensor:
        return _norm(x_BSW, self.weight(f"{self.prefix}{module}.weight"), self.model.arch.norm_eps)


def _attention(
    layer: _Layer, arch: LlamaArch, x_BSW: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor
) -> torch.Tensor:
    """Causal attention among the tokens given, whatever positions they stand at."""
    batch, size, _ = x_BSW.shape

    def heads(module: str, count: int) -> torch.Tensor:
        out = layer.product(f"self_attn.{module}_proj", x_BSW).view(batch, size, count, arch.head_dim)
        return layer.norm(f"self_attn.{module}_norm", out) if arch.qk_norm and module != "v" else out

    def turned(x_BSHD: torch.Tensor) -> torch.Tensor:
        return apply_rope(x_BSHD.transpose(0, 1), cos_SD, sin_SD).permute(1, 2, 0, 3)

    q_BHSD, k_BHSD = turned(heads("q", arch.heads)), turned(heads("k", arch.kv_heads))
    v_BHSD = heads("v", arch.kv_heads).transpose(1, 2)
    shared = arch.heads // arch.kv_heads
    k_BHSD, v_BHSD = k_BHSD.repeat_interleave(shared, 1), v_BHSD.repeat_interleave(shared, 1)
    scores = q_BHSD @ k_BHSD.transpose(2, 3) * arch.head_dim**-0.5
    future = torch.full((size, size), torch.finfo(torch.float32).min).triu(1)
    mixed = torch.softmax(scores + future, dim=-1) @ v_BHSD
    return layer.product("self_attn.o_proj", mixed.transpose(1, 2).reshape(batch, size, -1))


@torch.no_grad()
def own_logits(
    model: TrainedModel, weight: Weight, tokens_BS: torch.Tensor, positions: list[torch.Tensor], apart: bool
) -> list[torch.Tensor]:
    """Logits fp32 [B, S, V], one for each of `positions` (int64 [S]), holding one layer at a time.

    Args:
        weight: of the trained model, but for the adapters where `apart`.
        apart: add adapters to a product's output, as PEFT does, instead of finding them in its weight.
    """
    arch = model.arch
    start = torch.nn.functional.embedding(tokens_BS, weight("model.embed_tokens.weight")).float()
    states = [start.clone() for _ in positions]
    tables = [rope_tables(model.rope, arch.head_dim, where) for where in positions]
    for number in range(arch.layers):
        layer = _Layer(model, number, _kept(weight), apart)
        for index, x_BSW in enumerate(states):
            x_BSW = x_BSW + _attention(layer, arch, layer.norm("input_layernorm", x_BSW), *tables[index])
            inner = layer.norm("post_attention_layernorm", x_BSW)
            gated = silu(layer.product("mlp.gate_proj", inner)) * layer.product("mlp.up_proj", inner)
            states[index] = x_BSW + layer.product("mlp.down_proj", gated)
    last = weight("model.norm.weight")
    head = weight("model.embed_tokens.weight" if arch.tied else "lm_head.weight").float()
    return [linear(_norm(x_BSW, last, arch.norm_eps), head) for x_BSW in states]


def _kept(weight: Weight) -> Weight:
    """Each tensor read once, and held while one layer is computed at every set of positions."""
    held: dict[str, torch.Tensor] = {}

    def get(name: str) -> torch.Tensor:
        if name not in held:
            held[name] = weight(name).float()
        return held[name]

    return get
