"""Which parameters a configuration trains, by name."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.sections import LoraConfig
from pipeline.planning.arch import LlamaArch
from pipeline.planning.tensors import adapter_shapes, hf_tensor_shapes, to_ours


def kind_of(name: str) -> str:
    """Which trainable kind a parameter of ours belongs to: lora, embed, norm, lm_head or base.

    Decided per parameter, not per module: Transformer Engine keeps norms inside linears.
    """
    if ".adapters." in name:
        return "lora"
    if name == "embedding.weight":
        return "embed"
    if name.endswith("layernorm.weight"):
        return "norm"
    return "lm_head" if name == "output_layer.weight" else "base"


def trains(name: str, kinds: Sequence[str], arch: LlamaArch) -> bool:
    """Whether `train.trainable` selects a parameter of ours; with tied embeddings `lm_head` means the embedding."""
    wanted = set(kinds) | ({"embed"} if arch.tied and "lm_head" in kinds else set())
    return kind_of(name) in wanted


def trained_names(arch: LlamaArch, lora: LoraConfig, kinds: Sequence[str]) -> set[str]:
    """Canonical names of everything that trains, over all ranks: what a checkpoint of such a run must hold."""
    every = [*hf_tensor_shapes(arch), *adapter_shapes(arch, lora)]
    return {name for name in every if trains(to_ours(name)[0], kinds, arch)}
