"""Adapters of others, read: PEFT folders, and LongLoRA's two files (`trainable_params` beside `adapter_model`).

LongLoRA's script `get_trainable_weights.py` writes both with torch.save. A pickle can run code when it is read, so
`.bin` files are opened with `weights_only=True` (tensors and containers, nothing else) and mapped, never otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from parallel.errors import CheckpointError, ConfigError
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import LORA_TARGETS, LoraConfig
from pipeline.export.adapter_notes import CONFIG, check_complete, read_config, read_note, saved_whole, stretch
from pipeline.export.trained_model import LazyTensors, TrainedModel, find_base, grown_arch, wrong_base
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.hf.vocabulary import VOCABULARY_HF
from pipeline.planning import tensors as names
from pipeline.planning.arch import LlamaArch, read_arch

EMBEDDING, HEAD = VOCABULARY_HF
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


def _row_lists(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """Matrices whose rows the adapter holds singly, and which: PEFT lists them by module, or the embedding's alone."""
    listed = config.get("trainable_token_indices") or {}
    by_module = {"embed_tokens": listed} if isinstance(listed, list) else listed
    return {
        name: ids
        for key, ids in by_module.items()
        for name in VOCABULARY_HF
        # Of a tied matrix PEFT keeps the rows once.
        if f".{name}".endswith(f".{key}.weight") and not (tied and name == HEAD)
    }


def _collect(folder: Path, config: Mapping[str, Any], base: HfCheckpoint, arch: LlamaArch) -> _Renamed:
    """Both files' tensors; of one in both, `trainable_params` wins, as it is loaded last."""
    adapter, trainable = _tensors(folder, ADAPTER), _tensors(folder, TRAINABLE)
    if adapter is None:
        raise CheckpointError(f"{folder}: holds no {ADAPTER}.safetensors or .bin; give a PEFT or LongLoRA folder.")
    found, lists = _Renamed(base), _row_lists(config, arch.tied)
    for source in (adapter, trainable or {}):
        seen = {name: stored for name, (_, stored, _) in found.rows.items()}
        for stored in source:
            if ".original_module." in stored:
                continue  # the base's matrix, which PEFT keeps beside the trained one
            rows = stored.endswith(ROWS)
            name = stored.removeprefix(PREFIX).removesuffix(ROWS) + ".weight" if rows else _canonical(stored)
            if name in seen:
                # PEFT saves a matrix of modules_to_save once more where the embedding was resized.
                if not rows and seen[name] in source and torch.equal(source[stored], source[seen[name]]):
                    continue
                raise CheckpointError(
                    f"{folder}: {stored} and {seen[name]} are both {name}, so it is unclear which counts; merge this "
                    "adapter with PEFT itself."
                )
            seen[name] = stored
            if not rows:
                found.where[name] = source, stored
                continue
            ids, count = lists.get(name), len(source[stored])
            size = base.facts[name].shape[0] if name in base.facts else 0
            fits = isinstance(ids, list) and all(type(i) is int and 0 <= i < size for i in ids)
            if not isinstance(ids, list) or not fits or len(set(ids)) != len(ids) or len(ids) != count:
                raise CheckpointError(
                    f"{folder / CONFIG}: trainable_token_indices do not fit the {count} rows kept of {name}; copy or "
                    "download the adapter again."
                )
            found.rows[name] = source, stored, ids
    _check_whole(folder, found, lists, map(_canonical, trainable or ()), arch)
    if arch.tied:
        _check_tied(folder, config, found, base, own_file=EMBEDDING in map(_canonical, trainable or ()))
    return found


def _check_whole(
    folder: Path, found: _Renamed, lists: Mapping[str, Any], trainable: Iterable[str], arch: LlamaArch
) -> None:
    """Single rows that are listed, and norms that `trainable_params` holds of some layers, must all be there."""
    mend = "copy or download the adapter again"
    for name in lists:
        if name not in found.rows:
            raise CheckpointError(f"{folder}: lacks the rows of {name} that {CONFIG} lists; {mend}.")
    for name in trainable:
        _, inside, rest = name.partition("model.layers.")
        for layer in range(arch.layers) if inside else ():
            other = f"model.layers.{layer}.{rest.partition('.')[2]}"
            if other not in found.where:
                raise CheckpointError(f"{folder}: {TRAINABLE} lacks {other} beside that of other layers; {mend}.")


def _check_tied(folder: Path, config: Mapping[str, Any], found: _Renamed, base: HfCheckpoint, own_file: bool) -> None:
    """Drop PEFT's second copy of a tied matrix, refusing adapters in which the two came apart.

    Args:
        own_file: the embedding is in `trainable_params`, which no wrapper of PEFT's comes between.
    """
    apart = f"{folder}: trained the embedding and the output weights apart, which base {base.folder} ties"
    mend = "merge this adapter with PEFT itself"
    if HEAD in found.where:
        head = found[HEAD]
        del found.where[HEAD]
        other = found[EMBEDDING] if EMBEDDING in found else base.tensor(EMBEDDING)
        if head.shape != other.shape or not torch.equal(head.float(), other.float()):
            raise CheckpointError(f"{apart}; {mend}.")
    elif not config.get("ensure_weight_tying"):
        # PEFT's wrapper around the embedding leaves the output weights at the base's.
        wrapped = EMBEDDING in found.where and not own_file and saved_whole(config, EMBEDDING.removesuffix(".weight"))
        if wrapped or saved_whole(config, HEAD.removesuffix(".weight")):
            raise CheckpointError(f"{apart} ({CONFIG} does not set ensure_weight_tying); {mend}.")


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
        context: tokens of the result; None takes what the adapter tells (`longspan.json`), else, but not with
            LongLoRA's two files, the base's own.
        rope: how positions were stretched; None takes what the adapter tells, else linear interpolation by the next
            whole factor, LongLoRA's rule.
        base_hash: of the base, where it is known already: hashing reads it all.

    Raises:
        CheckpointError, ConfigError: the folder is damaged or incomplete, would need code to be run, or does not fit
            the base; or `context` or `rope` contradicts what the adapter tells.
    """
    config, note = read_config(folder), read_note(folder)
    where = find_base(str(config.get("base_model_name_or_path")), base)
    checkpoint, arch = HfCheckpoint(where), read_arch(where)
    two_files = any((folder / f"{TRAINABLE}.{end}").is_file() for end in ("safetensors", "bin"))
    # Before the hash, which reads the whole base.
    context, plan = stretch(note, arch, context, rope, folder, two_files or _declares_another(folder, arch))
    tensors = _collect(folder, config, checkpoint, arch)
    lora = _lora(config, tensors, folder / CONFIG)
    check_complete(config, tensors, arch, note, folder)
    found = base_hash or checkpoint.base_hash()
    if note.base_hash is not None and note.base_hash != found:
        raise wrong_base(where, folder, found, note.base_hash)
    rows = {len(tensors[name]) for name in VOCABULARY_HF if name in tensors.where}
    arch = grown_arch(where, max(rows) if rows else None, f"{folder}")
    return TrainedModel(where, found, arch, plan, context, lora, tensors, note.step, folder)


def _declares_another(folder: Path, arch: LlamaArch) -> bool:
    """A config.json beside the adapter, as Longspan writes one, has another RoPE or context than the base."""
    try:
        there = read_arch(folder)
    except ConfigError:
        return False
    return (there.rope_scaling, there.rope_theta, there.max_positions) != (
        arch.rope_scaling,
        arch.rope_theta,
        arch.max_positions,
    )
