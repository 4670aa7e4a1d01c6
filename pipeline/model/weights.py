"""Weights in and out of the model under canonical (Hugging Face) names; which of them train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from parallel.errors import CheckpointError, ConfigError
from pipeline.hf_files import HfCheckpoint
from pipeline.model import names
from pipeline.model.arch import LlamaArch
from pipeline.model.stage import LlamaStage


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


def load_base(stage: LlamaStage, checkpoint: HfCheckpoint) -> None:
    """Fill every parameter but the adapters from a Hugging Face checkpoint, casting to the parameter's dtype.

    Raises:
        CheckpointError: a tensor is missing or misshaped (named).
    """
    arch = stage.arch
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if kind_of(name) == "lora":
                continue
            parts = [checkpoint.tensor(hf_name) for hf_name, _ in names.to_hf(name)]
            parameter.copy_(_assemble(name, parts, arch, parameter.shape))


def _assemble(name: str, parts: Sequence[torch.Tensor], arch: LlamaArch, shape: torch.Size) -> torch.Tensor:
    """Fuse the Hugging Face tensors of one parameter of ours and check the result's shape."""
    if "linear_qkv." in name:
        query, key, value = parts
        whole = names.fuse_qkv(query, key, value, arch)
    elif "linear_fc1." in name:
        whole = names.fuse_gate_up(*parts)
    else:
        (whole,) = parts
    if whole.shape != shape:
        raise CheckpointError(
            f"{names.to_hf(name)[0][0]}: shape {tuple(whole.shape)} in the checkpoint does not fit the "
            f"{tuple(shape)} that config.json describes; the two files belong to different models."
        )
    return whole


def mark_trainable(stage: LlamaStage, kinds: Sequence[str]) -> None:
    """Set requires_grad per parameter; with tied embeddings `lm_head` means the embedding.

    Raises:
        ConfigError: nothing would train.
    """
    wanted = set(kinds) | ({"embed"} if stage.arch.tied and "lm_head" in kinds else set())
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_(kind_of(name) in wanted)
    if not any(parameter.requires_grad for parameter in stage.parameters()):
        raise ConfigError(f"train.trainable: {', '.join(kinds)} selects no parameter of this model.")


def trainable(stage: LlamaStage) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    """(canonical name, kind, parameter) of everything that trains; such parameters are never fused."""
    for name, parameter in stage.named_parameters():
        if parameter.requires_grad:
            ((hf_name, _),) = names.to_hf(name)
            yield hf_name, kind_of(name), parameter


def load_trained(stage: LlamaStage, tensors: Mapping[str, torch.Tensor]) -> None:
    """Overwrite trained parameters from a canonical state dict.

    Raises:
        CheckpointError: names or shapes differ from what trains here.
    """
    expected = {name: parameter for name, _, parameter in trainable(stage)}
    if expected.keys() != tensors.keys():
        odd = sorted(expected.keys() ^ tensors.keys())
        raise CheckpointError(
            f"Checkpoint: trained tensors differ from the configuration's ({odd[0]} and {len(odd) - 1} more on one "
            "side only); resume with the lora and train.trainable settings it was made with."
        )
    with torch.no_grad():
        for name, parameter in expected.items():
            if parameter.shape != tensors[name].shape:
                raise CheckpointError(
                    f"Checkpoint: {name} has shape {tuple(tensors[name].shape)}, the model {tuple(parameter.shape)}; "
                    "resume with the lora settings it was made with."
                )
            parameter.copy_(tensors[name])
