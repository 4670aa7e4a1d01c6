"""A base model and what was trained on it: where every export begins, whichever form the training came in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from parallel.errors import CheckpointError
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.tensors import whole_trained
from pipeline.config.rope import RopeSettings, used_rope
from pipeline.config.sections import LoraConfig
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.hf.companions import add_pad_token, copy_companions, tokenizer_size
from pipeline.hf.vocabulary import VOCABULARY_HF, grown_tensor
from pipeline.planning import tensors as names
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.rope import ROPE_KEYS, RopePlan, hf_rope_fields, plan_rope
from pipeline.planning.run_plan import check_growth
from pipeline.storage.safetensors import SafetensorsFile

PAD_TOKEN = "[PAD]"
MERGE_ELEMENTS = 1 << 25
"""Weights merged at a time: bounds the fp32 copies of a large matrix to a few times 128 MiB."""


class LazyTensors(Mapping[str, torch.Tensor]):
    """Tensors of safetensors files, read when asked for; the files may be deleted meanwhile (a running run does).

    Args:
        files: paths; a tensor stands in one of them.
        rename: name in the file -> name here.

    Raises:
        CheckpointError: a file is missing, damaged, or two hold the same tensor.
    """

    def __init__(self, files: list[Path], rename: Mapping[str, str] | None = None) -> None:
        self._where: dict[str, tuple[SafetensorsFile, str]] = {}
        for path in files:
            file = SafetensorsFile(path)
            for stored in file.facts:
                name = stored if rename is None else rename.get(stored, stored)
                if name in self._where:
                    raise CheckpointError(f"{path}: holds {name}, which another file holds too; export it again.")
                self._where[name] = file, stored

    def __getitem__(self, name: str) -> torch.Tensor:
        file, stored = self._where[name]
        return file.tensor(stored)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading it."""
        file, stored = self._where[name]
        return file.facts[stored].shape


@dataclass(frozen=True)
class TrainedModel:
    """A base model and what was trained on it, all that an export needs."""

    base: Path
    """Hugging Face folder."""
    base_hash: str
    arch: LlamaArch
    """Of the result: its vocabulary may have more rows than the base's."""
    rope: RopePlan
    context: int
    """Tokens the result declares."""
    lora: LoraConfig
    trained: Mapping[str, torch.Tensor]
    """Canonical names -> tensors, as in a checkpoint."""
    step: int
    source: Path | None = None
    """The checkpoint or adapter folder; its tokenizer files win over the base's."""

    def __post_init__(self) -> None:
        allowed = names.hf_tensor_shapes(self.arch) | names.adapter_shapes(self.arch, self.lora)
        for name in self.trained:
            shape = self.shape(name)
            if name not in allowed:
                raise CheckpointError(f"{name}: the checkpoint trained it, but base {self.base} has no place for it.")
            if shape != allowed[name]:
                raise CheckpointError(
                    f"{name}: has shape {shape} in the checkpoint and {allowed[name]} by its config and "
                    f"base {self.base}; give the base it was trained on."
                )
            partner = partner_of(name)
            if partner is not None and partner not in self.trained:
                raise CheckpointError(f"{partner}: is missing beside {name}; the checkpoint is incomplete.")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a trained tensor, without reading it where it lies in a file."""
        if isinstance(self.trained, LazyTensors):
            return self.trained.shape(name)
        return tuple(self.trained[name].shape)

    @property
    def adapters(self) -> list[str]:
        """Canonical names of the adapters' tensors, sorted."""
        return sorted(name for name in self.trained if partner_of(name) is not None)

    @property
    def grown(self) -> bool:
        """The vocabulary has rows the base lacks."""
        return self.arch.vocab != read_arch(self.base).vocab

    def changes(self, name: str) -> bool:
        """Arithmetic or replacement happens to this base tensor."""
        stem = name.removesuffix(".weight")
        return name in self.trained or f"{stem}.lora_A.weight" in self.trained or (name in VOCABULARY_HF and self.grown)

    def base_tensor(self, checkpoint: HfCheckpoint, name: str) -> torch.Tensor:
        """A tensor of the base as training began: with rows for added tokens."""
        return grown_tensor(checkpoint, name, self.arch.vocab)

    def merged(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """A base tensor after training, in the base's dtype; W + scale B A is added up in fp32, some rows at a time."""
        if name in self.trained:
            return self.trained[name].to(base.dtype)
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" not in self.trained:
            return base
        low, high = (self.trained[f"{stem}.lora_{side}.weight"].float() for side in "AB")
        result = torch.empty_like(base)
        rows = max(1, MERGE_ELEMENTS // base.shape[1])
        for start in range(0, len(base), rows):
            part = slice(start, start + rows)
            result[part] = (base[part].float() + self.lora.scale * (high[part] @ low)).to(base.dtype)
        return result


def partner_of(name: str) -> str | None:
    """The other factor of an adapter; None for other tensors."""
    for one, other in ((".lora_A.weight", ".lora_B.weight"), (".lora_B.weight", ".lora_A.weight")):
        if name.endswith(one):
            return name.removesuffix(one) + other
    return None


def find_base(recorded: str, given: Path | None) -> Path:
    """The base model's folder.

    Raises:
        CheckpointError: it is not there.
    """
    folder = Path(given) if given is not None else Path(recorded)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: the base model is not there; say where it lies with --base.")
    return folder


def wrong_base(folder: Path, what: Path, found: str, expected: str) -> CheckpointError:
    """The base model is another one than `what` was trained on."""
    return CheckpointError(
        f"{folder}: is not the base {what} was trained on (hash {found[:12]}, expected {expected[:12]}); "
        "give that one with --base."
    )


def load_trained_model(checkpoint: Path, base: Path | None = None) -> TrainedModel:
    """Read a checkpoint folder, verified against its checksums, and check that the base is the one it was trained on.

    The run may go on meanwhile: what was opened stays readable when the run deletes old checkpoints.

    Args:
        base: where the base model lies now; None takes the path the run recorded.

    Raises:
        CheckpointError: the checkpoint is damaged, or the base is missing or another model.
    """
    manifest = read_manifest(checkpoint).raw
    try:
        config = manifest["config"]
        model, lora = config["model"], config["lora"]
        rope = RopeSettings(**used_rope(model["rope"]))
        adapters = LoraConfig(**{**lora, "targets": tuple(lora["targets"])})
        context, recorded, expected = int(model["context"]), str(manifest["base"]), str(manifest["base_hash"])
        vocab = model.get("vocab")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: its manifest lacks what an export needs ({type(error).__name__}: {error}); export another "
            "checkpoint."
        ) from None
    # Opened before the base is hashed, which takes minutes: by then the run may have deleted the checkpoint.
    trained = whole_trained(checkpoint)
    folder = find_base(recorded, base)
    found = HfCheckpoint(folder).base_hash()
    if found != expected:
        raise wrong_base(folder, checkpoint, found, expected)
    arch = grown_arch(folder, vocab, "model.vocab")
    plan = plan_rope(arch, rope, context)
    return TrainedModel(folder, expected, arch, plan, context, adapters, trained, int(manifest["step"]), checkpoint)


def grown_arch(folder: Path, vocab: int | None, where: str) -> LlamaArch:
    """The base's architecture, with `vocab` rows.

    Raises:
        ConfigError: fewer rows than the base has.
    """
    arch = read_arch(folder)
    if vocab is None:
        return arch
    check_growth(arch.vocab, vocab, where)
    return replace(arch, vocab=vocab)


def extended_config(model: TrainedModel) -> dict[str, Any]:
    """config.json of the base with the new RoPE, context and vocabulary, readable by transformers 4 and 5."""
    config = json.loads((model.base / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in ROPE_KEYS}
    return {**kept, **hf_rope_fields(model.rope, model.arch, model.context), "vocab_size": model.arch.vocab}


def companions(model: TrainedModel, folder: Path) -> None:
    """Put tokenizer and generation files into an export; one added row that no token names is LongLoRA's `[PAD]`."""
    copy_companions(model.base, folder, model.context, model.source)
    if model.arch.vocab == read_arch(model.base).vocab + 1 and tokenizer_size(folder) == model.arch.vocab - 1:
        add_pad_token(folder, PAD_TOKEN)
