"""Adapters of others, read: PEFT folders, and LongLoRA's two files (`trainable_params` beside `adapter_model`).

LongLoRA's script `get_trainable_weights.py` writes both with torch.save. A pickle can run code when it is read, so
`.bin` files are opened with `weights_only=True` (tensors and containers, nothing else) and mapped, never otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from parallel.errors import CheckpointError, ConfigError
from pipeline.hf_files import HfCheckpoint
from pipeline.model import names
from pipeline.model.rope import RopePlan, plan_rope
from pipeline.model.vocabulary import VOCABULARY_HF
from pipeline.schema import LORA_TARGETS, LoraConfig, RopeSettings
from pipeline.trained_model import LazyTensors, TrainedModel, find_base, grown_arch, wrong_base

PREFIX = "base_model.model."
ADAPTER, TRAINABLE = "adapter_model", "trainable_params"
ROWS = ".token_adapter.trainable_tokens_delta"
"""PEFT's suffix of single embedding rows (`trainable_token_indices`); they are new values, not differences."""
_PART_OF = {module.split(".")[-1]: part for part, (module, _) in names.PROJECTIONS.items()}


def read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """A file of torch.save that holds a dict of tensors and nothing that runs code.

    Raises:
        CheckpointError: it is no zip file of torch >= 1.6, is damaged, or holds anything else.
    """
    mend = "convert it to .safetensors where you trust it, and give that"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch tells damage and refusal by half a dozen types, UnpicklingError among them
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{path}: is no plain torch.save of tensors, so it is not read ({reason}); {mend}."
        ) from (None)
    if not isinstance(found, dict) or not all(isinstance(k, str) and type(v) is torch.Tensor for k, v in found.items()):
        raise CheckpointError(f"{path}: holds other things than named tensors; {mend}.")
    for name, tensor in found.items():
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise CheckpointError(f"{path}: {name} has dtype {tensor.dtype}, which is not a plain float; {mend}.")
    return found


def _tensors(folder: Path, stem: str) -> Mapping[str, torch.Tensor] | None:
    """What `stem`.safetensors or `stem`.bin holds; None where neither is there."""
    if (folder / f"{stem}.safetensors").is_file():
        return LazyTensors([folder / f"{stem}.safetensors"])
    if (folder / f"{stem}.bin").is_file():
        return read_pickled(folder / f"{stem}.bin")
    return None


def _canonical(name: str) -> str:
    """Our name of a tensor in an adapter's file."""
    name = name.removeprefix(PREFIX)
    for inserted in (".modules_to_save.default.", ".modules_to_save.", ".base_layer."):
        name = name.replace(inserted, ".")
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; give a PEFT or LongLoRA adapter folder.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download it again.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: is not a LoRA adapter; only peft_type LORA is supported.")
    # Each would change what is computed.
    for key in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "layers_to_transform", "lora_bias"):
        if config.get(key):
            raise CheckpointError(f"{path}: {key} is set, which is not supported; merge this adapter with PEFT itself.")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias {config['bias']!r} is not supported; merge this adapter with PEFT itself.")
    return config


def _lora(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], path: Path) -> LoraConfig:
    modules = {name.split(".")[-3] for name in tensors if ".lora_A." in name}
    odd = sorted(modules - _PART_OF.keys())
    if odd:
        raise CheckpointError(f"{path}: adapts {odd[0]}, which is not supported; merge this adapter with PEFT itself.")
    targets = tuple(part for part in LORA_TARGETS if part in {_PART_OF[module] for module in modules})
    try:
        return LoraConfig(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            targets=targets,
            rslora=bool(config.get("use_rslora")),
        )
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path}: lacks a usable r or lora_alpha ({error}); download it again.") from None


class _Renamed(Mapping[str, torch.Tensor]):
    """Tensors of several files under canonical names, read when asked for; single rows put into the base's matrix."""

    def __init__(self, base: HfCheckpoint) -> None:
        self.base = base
        self.where: dict[str, tuple[Mapping[str, torch.Tensor], str]] = {}
        self.rows: dict[str, tuple[Mapping[str, torch.Tensor], str, list[int]]] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.rows:
            source, stored, ids = self.rows[name]
            whole = self.base.tensor(name).clone()
            whole[torch.tensor(ids)] = source[stored].to(whole.dtype)
            return whole
        source, stored = self.where[name]
        return source[stored]

    def __iter__(self) -> Any:
        return iter([*self.where, *self.rows])

    def __len__(self) -> int:
        return len(self.where) + len(self.rows)


def _collect(folder: Path, config: Mapping[str, Any], base: HfCheckpoint) -> _Renamed:
    """Both files' tensors; of one in both, `trainable_params` wins, as it is loaded last."""
    adapter, trainable = _tensors(folder, ADAPTER), _tensors(folder, TRAINABLE)
    if adapter is None:
        raise CheckpointError(f"{folder}: holds no {ADAPTER}.safetensors or .bin; give a PEFT or LongLoRA folder.")
    found = _Renamed(base)
    for source in (adapter, trainable):
        for stored in source or ():
            if stored.endswith(ROWS):
                name = stored.removeprefix(PREFIX).removesuffix(ROWS) + ".weight"
                listed = config.get("trainable_token_indices")
                ids = next(iter(listed.values())) if isinstance(listed, dict) and listed else listed
                if not ids or not all(0 <= i < base.facts[name].shape[0] for i in ids):
                    raise CheckpointError(
                        f"{folder / 'adapter_config.json'}: trainable_token_indices do not fit {name}."
                    )
                found.rows[name] = source, stored, list(ids)  # type: ignore[assignment]
            else:
                found.where[_canonical(stored)] = source, stored  # type: ignore[assignment]
    if "lm_head.weight" not in base.facts and "lm_head.weight" in found.where:
        # PEFT keeps tied output weights too; they are the embedding's.
        del found.where["lm_head.weight"]
    return found


def load_adapter(
    folder: Path,
    base: Path | None = None,
    context: int | None = None,
    rope: RopeSettings | None = None,
    base_hash: str | None = None,
) -> TrainedModel:
    """Read a PEFT adapter or LongLoRA's two files, of Longspan or of others.

    Rows that the trained embedding has beyond the base's (`[PAD]`) make the vocabulary grow.

    Args:
        base: the base model's folder; None takes `base_model_name_or_path` where that is a folder.
        context: tokens of the result; None takes what the adapter tells (`longspan.json`), else the base's own.
        rope: how positions were stretched; None takes what the adapter tells, else linear interpolation by the next
            whole factor, LongLoRA's rule.
        base_hash: of the base, where it is known already: hashing reads it all.

    Raises:
        CheckpointError, ConfigError: the folder is damaged, would need code to be run, or does not fit the base.
    """
    config = _config(folder)
    note: dict[str, Any] = {}
    # What Longspan writes beside its own adapters.
    if (folder / "longspan.json").is_file():
        note = json.loads((folder / "longspan.json").read_text(encoding="utf-8"))
    where = find_base(str(config.get("base_model_name_or_path")), base)
    checkpoint = HfCheckpoint(where)
    found = base_hash or checkpoint.base_hash()
    if note.get("base_hash", found) != found:
        raise wrong_base(where, folder, found, note["base_hash"])
    tensors = _collect(folder, config, checkpoint)
    lora = _lora(config, tensors, folder / "adapter_config.json")
    rows = {len(tensors[name]) for name in VOCABULARY_HF if name in tensors.where}
    arch = grown_arch(where, max(rows) if rows else None, f"{folder}")
    context = context or note.get("context") or arch.max_positions
    if rope is None and "rope_plan" in note and context == note.get("context"):
        plan = RopePlan(**note["rope_plan"])
    else:
        if rope is None and context > arch.max_positions and arch.rope_scaling is None:
            rope = RopeSettings(type="linear", factor=float(-(-context // arch.max_positions)))
        plan = plan_rope(arch, rope or RopeSettings(), context)
    return TrainedModel(where, found, arch, plan, context, lora, tensors, int(note.get("step", 0)), folder)
