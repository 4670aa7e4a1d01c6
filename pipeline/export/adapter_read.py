"""Adapters of others, read: PEFT folders, and LongLoRA's two files (`trainable_params` beside `adapter_model`).

LongLoRA's script `get_trainable_weights.py` writes both with torch.save. A pickle can run code when it is read, so
`.bin` files are opened with `weights_only=True` (tensors and containers, nothing else) and mapped, never otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch

from parallel.errors import CheckpointError, ConfigError
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import LORA_TARGETS, LoraConfig, ModelConfig
from pipeline.export.adapter_kinds import (
    VOCABULARY_MODULES,
    canonical,
    module_of,
    own_settings,
    refuse_vocabulary,
    taken_apart,
)
from pipeline.export.adapter_notes import (
    CONFIG,
    AdapterNote,
    check_complete,
    read_config,
    read_note,
    saved_whole,
    stretch,
)
from pipeline.export.trained_model import (
    LazyTensors,
    TrainedModel,
    check_tokenizer,
    find_base,
    grown_arch,
    shape_of,
    wrong_base,
)
from pipeline.hf.checkpoint import UNGATHERED, HfCheckpoint
from pipeline.hf.vocabulary import VOCABULARY_HF
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.tensors import PROJECTIONS
from pipeline.storage.pickled import read_pickled

EMBEDDING, HEAD = VOCABULARY_HF
PREFIX = "base_model.model."
ADAPTER, TRAINABLE = "adapter_model", "trainable_params"
ROWS = ".token_adapter.trainable_tokens_delta"
"""PEFT's suffix of single embedding rows (`trainable_token_indices`); they are new values, not differences."""
BELOW = ".token_adapter.base_layer.weight"
"""PEFT's suffix of the whole matrix that such rows replace rows of; written where the vocabulary grew."""
_PART_OF = {module.split(".")[-1]: part for part, (module, _) in PROJECTIONS.items()}


def _tensors(folder: Path, stem: str) -> Mapping[str, torch.Tensor] | None:
    """What `stem`.safetensors or `stem`.bin holds; None where neither is there.

    Raises:
        CheckpointError: one is damaged, both are there and differ, or a tensor has no elements.
    """
    plain, pickled = folder / f"{stem}.safetensors", folder / f"{stem}.bin"
    found: Mapping[str, torch.Tensor] | None = LazyTensors([plain]) if plain.is_file() else None
    if pickled.is_file():
        other = read_pickled(pickled)
        if found is not None and not _same(found, other):
            raise CheckpointError(
                f"{plain}: holds other tensors than {pickled.name} beside it, so it is unclear which were trained; "
                "move the older one away."
            )
        found = other if found is None else found
    if found is None:
        return None
    for name in found:
        if 0 in shape_of(found, name):
            raise CheckpointError(f"{folder}: {stem}'s {name} {UNGATHERED}.")
    return found


def _same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _canonical(name: str) -> str:
    """Our name of a tensor in an adapter's file."""
    name = name.removeprefix(PREFIX)
    for inserted in (".modules_to_save.default.", ".modules_to_save.", ".base_layer."):
        name = name.replace(inserted, ".")
    return canonical(name)


def _matrix(stored: str, suffix: str) -> str:
    """Our name of the matrix that a tensor with this suffix belongs to."""
    return stored.removeprefix(PREFIX).removesuffix(suffix) + ".weight"


def _lora(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], path: Path) -> LoraConfig:
    adapted = {module for name in tensors if (module := module_of(name)) is not None}
    modules = {module.split(".")[-1] for module in adapted.difference(VOCABULARY_MODULES)}
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
    """Tensors of several files under canonical names, read when asked for; single rows put into the matrix that they
    are rows of."""

    def __init__(self, base: HfCheckpoint, fused: bool) -> None:
        self.base, self.fused = base, fused
        """Whether the adapter is of a base with fused projections."""
        self.where: dict[str, tuple[Mapping[str, torch.Tensor], str]] = {}
        self.rows: dict[str, tuple[Mapping[str, torch.Tensor], str, list[int]]] = {}
        self.under: dict[str, tuple[Mapping[str, torch.Tensor], str]] = {}
        """The matrix that single rows replace rows of, where the adapter holds it: PEFT keeps a resized one."""

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.rows:
            source, stored, ids = self.rows[name]
            below = self.under.get(name)
            whole = self.base.tensor(name) if below is None else below[0][below[1]].clone()
            if self.length(name) > len(whole):  # the added rows are all among `ids`
                whole = torch.cat((whole, whole.new_empty((self.length(name) - len(whole), whole.shape[1]))))
            whole[torch.tensor(ids)] = source[stored].to(whole.dtype)
            return whole
        source, stored = self.where[name]
        return source[stored]

    def length(self, name: str) -> int:
        """Rows of a matrix."""
        if name not in self.rows:
            return len(self[name])
        if name in self.under:
            source, stored = self.under[name]
            return len(source[stored])
        return max(self.base.facts[name].shape[0], *(number + 1 for number in self.rows[name][2]))

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
        # Of a tied matrix the rows are the embedding's.
        if f".{name}".endswith(f".{key}.weight") and not (tied and name == HEAD)
    }


def _fit(ids: Any, count: int, stored: int, below: int | None) -> TypeGuard[list[int]]:
    """Whether row numbers are those of `count` kept rows.

    Args:
        stored: rows of the base's matrix.
        below: rows of the matrix that the adapter keeps beside them; None: it keeps none, so that rows which the base
            lacks must all be listed.
    """
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids) or len({*ids}) != len(ids):
        return False
    end = max(ids, default=-1) + 1
    known = {*range(stored, end)} <= {*ids} and stored > 0 if below is None else end <= below
    return len(ids) == count and known


def _collect(
    folder: Path, config: Mapping[str, Any], base: HfCheckpoint, arch: LlamaArch, note: AdapterNote
) -> _Renamed:
    """Both files' tensors; of one in both, `trainable_params` wins, as it is loaded last."""
    adapter, trainable = _tensors(folder, ADAPTER), _tensors(folder, TRAINABLE)
    if adapter is None:
        raise CheckpointError(f"{folder}: holds no {ADAPTER}.safetensors or .bin; give a PEFT or LongLoRA folder.")
    apart = taken_apart(adapter, arch, PREFIX)
    found, lists = _Renamed(base, apart is not None), _row_lists(config, arch.tied)
    adapter = adapter if apart is None else apart
    if trainable is not None and not trainable and note.tensors is None:
        raise CheckpointError(
            f"{folder}: its {TRAINABLE} file holds no tensor, so what was trained beside LoRA is lost; copy or "
            "download it again, or remove it if nothing else was."
        )
    for source in (adapter, trainable or {}):
        below = {_matrix(stored, BELOW): stored for stored in source if stored.endswith(BELOW)}
        seen = {name: stored for name, (_, stored, _) in found.rows.items()}
        for stored in source:
            if ".original_module." in stored or stored.endswith(BELOW):
                continue  # the base's matrix, which PEFT keeps beside what was trained
            rows = stored.endswith(ROWS)
            name = _matrix(stored, ROWS) if rows else _canonical(stored)
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
            ids, count = lists.get(EMBEDDING if arch.tied and name == HEAD else name), len(source[stored])
            size = base.facts[name].shape[0] if name in base.facts and name in VOCABULARY_HF else 0
            if not _fit(ids, count, size, len(source[below[name]]) if name in below else None):
                raise CheckpointError(
                    f"{folder / CONFIG}: trainable_token_indices do not fit the {count} rows kept of {name}; copy or "
                    "download the adapter again, or save it with save_embedding_layers=True."
                )
            found.rows[name] = source, stored, ids
            if name in below:
                found.under[name] = source, below[name]
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
    if HEAD in found:
        head = found[HEAD]
        for kept in (found.where, found.rows):
            kept.pop(HEAD, None)
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
    two_files = _has_two_files(folder)
    # Before the hash, which reads the whole base.
    context, plan = stretch(note, arch, context, rope, folder, must_tell(folder, arch))
    tensors = _collect(folder, config, checkpoint, arch, note)
    lora = _lora(config, tensors, folder / CONFIG)
    check_complete(config, tensors, arch, note, folder, tensors.fused)
    own = own_settings(config, tensors, lora, folder / CONFIG)
    found = base_hash or checkpoint.base_hash()
    if note.base_hash is not None and note.base_hash != found:
        raise wrong_base(where, folder, found, note.base_hash)
    rows = {name: tensors.length(name) for name in VOCABULARY_HF if name in tensors}
    grown = grown_arch(where, max(rows.values()) if rows else None, f"{folder}")
    refuse_vocabulary(tensors, grown, arch.vocab, bool(config.get("use_dora")), folder)
    lacking = [name for name in VOCABULARY_HF if name not in rows and not (arch.tied and name == HEAD)]
    # LongLoRA's rule for the matrix it does not train is the mean; PEFT's users draw such rows at random.
    if grown.vocab > arch.vocab and lacking and not two_files:
        raise CheckpointError(
            f"{folder}: has {grown.vocab - arch.vocab} rows for added tokens and none of {lacking[0]} for them; save "
            "it again with save_embedding_layers=True."
        )
    model = TrainedModel(
        where,
        found,
        grown,
        plan,
        context,
        lora,
        tensors,
        note.step,
        folder,
        folder,
        names_pad=two_files,
        warnings=checkpoint.warnings,
        form=note.form,
        chat=note.chat,
        own=own,
    )
    check_tokenizer(model)
    return model


def load_adapter_of(folder: Path, model: ModelConfig, base_hash: str) -> TrainedModel:
    """A folder of adapters over a run's base; what it does not tell of context and RoPE, the run's settings do.

    Args:
        base_hash: of the run's base.

    Raises:
        CheckpointError, ConfigError: see `load_adapter`.
    """
    note = read_note(folder)
    context = None if note.context is not None else model.context
    return load_adapter(folder, Path(model.path), context, None if note.plan is not None else model.rope, base_hash)


def _has_two_files(folder: Path) -> bool:
    """Whether LongLoRA wrote it: what trains besides adapters is in a file of its own."""
    return any((folder / f"{TRAINABLE}.{end}").is_file() for end in ("safetensors", "bin"))


def must_tell(folder: Path, arch: LlamaArch) -> bool:
    """Whether the context must be given: the folder hints at another than the base's, and does not tell it."""
    return _has_two_files(folder) or _declares_another(folder, arch)


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
