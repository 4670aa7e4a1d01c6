"""What JSON beside an adapter tells (`adapter_config.json`, `longspan.json`), and whether the tensors keep to it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError, ConfigError
from pipeline.config.hub import MODEL, not_there
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import BASES
from pipeline.data.answer_ends import ChatFormat, format_of
from pipeline.export.adapter_kinds import (
    EMBEDDING_FACTORS,
    FACTORS,
    MAGNITUDE,
    VOCABULARY_MODULES,
    factor_names,
)
from pipeline.hf.fused import FUSED
from pipeline.hf.writer import NOTE
from pipeline.planning.arch import LlamaArch
from pipeline.planning.rope import RopePlan, plan_rope
from pipeline.planning.tensors import PROJECTIONS, hf_tensor_shapes
from pipeline.storage.json_file import read_object

CONFIG = "adapter_config.json"
_UNSUPPORTED = (
    *("fan_in_fan_out", "layers_to_transform", "lora_bias"),
    *("layer_replication", "target_parameters", "use_qalora", "use_bdlora", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config"),
)
"""Keys of PEFT's that change what is computed."""
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the base as it is; PiSSA, OLoRA, CorDA and others subtract from it."""
_ROPE_TYPES = ("none", "linear", "yarn", "llama3")


@dataclass(frozen=True)
class AdapterNote:
    """What Longspan wrote beside its own adapter; of others' adapters nothing is told."""

    base_hash: str | None = None
    step: int = 0
    context: int | None = None
    """Tokens it was trained for."""
    plan: RopePlan | None = None
    """How positions were stretched meanwhile; never without `context`."""
    tensors: int | None = None
    """Trained tensors written; None in notes of before they were counted."""
    form: str = "bf16"
    """How the base's matrices were kept in training (model.base)."""
    chat: ChatFormat | None = None
    """Of the conversations it was trained on."""


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, refused where it asks for more than LoRA and DoRA.

    Raises:
        CheckpointError: it is missing, damaged, or another adapter than can be merged here.
    """
    path = folder / CONFIG
    if not path.is_file():
        hub = "" if folder.exists() else not_there(str(folder), MODEL)
        raise CheckpointError(f"{path}: is missing; give a PEFT or LongLoRA adapter folder{hub}.")
    config = read_object(path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: is not a LoRA adapter; only peft_type LORA is supported.")
    mend = "which is not supported; merge this adapter with PEFT itself"
    for key in _UNSUPPORTED:
        value = config.get(key)
        # `layers_to_transform: 0` means the first layer.
        if value or (type(value) is int and key == "layers_to_transform"):
            raise CheckpointError(f"{path}: {key} is set, {mend}.")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias {config['bias']!r} is not supported; merge this adapter with PEFT itself.")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise CheckpointError(f"{path}: init_lora_weights is {start!r}, a start that changes the base, {mend}.")
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value = config.get(key)
        listed = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
        if value is not None and not listed and not (isinstance(value, str) and key != "modules_to_save"):
            raise CheckpointError(f"{path}: {key} must be a list of module names, got {value!r}; download it again.")
    rows = config.get("trainable_token_indices")
    if rows is not None and not isinstance(rows, list | dict):
        raise CheckpointError(f"{path}: trainable_token_indices are no list, but {rows!r}; download it again.")
    return config


def read_note(folder: Path) -> AdapterNote:
    """longspan.json; an empty note where there is none.

    Raises:
        CheckpointError: it is damaged or written by a newer Longspan.
    """
    path = folder / NOTE
    if not path.is_file():
        return AdapterNote()
    found = read_object(path)

    def bad(what: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: {what}, so it is damaged or of a newer Longspan; export the adapter again, or update Longspan."
        )

    if found.get("format", 1) != 1:
        raise bad(f"has format {found['format']!r} instead of 1")
    for key, kind in (("base_hash", str), ("step", int), ("context", int), ("tensors", int), ("rope_plan", dict)):
        if key in found and type(found[key]) is not kind:
            raise bad(f"{key} is {found[key]!r}")
    plan = None
    if "rope_plan" in found:
        declared = found["rope_plan"]
        known = {field.name: str(field.type) for field in dataclasses.fields(RopePlan)}
        if not known.keys() >= declared.keys() >= {"type", "theta", "factor", "original_context"}:
            raise bad("rope_plan has other fields than are known")
        for key, value in declared.items():
            number = type(value) in (int, float) and 0 < value < float("inf")
            fits = {"str": value in _ROPE_TYPES, "bool": type(value) is bool}
            whole = number and type(value) is int
            # Of linear scaling alone it may be open.
            fits["int | None"] = whole or (value is None and declared["type"] == "linear")
            if not fits.get(known[key], number):
                raise bad(f"rope_plan's {key} is {value!r}")
        plan = RopePlan(**declared)
        if "context" not in found:
            raise bad("context is missing beside rope_plan")
    if found.get("context", 1) < 1:
        raise bad(f"context is {found['context']!r}")
    form = found.get("trained_on", "bf16")
    if form not in BASES:
        raise bad(f"trained_on is {form!r}")
    known_facts = found.get("base_hash"), found.get("step", 0), found.get("context"), plan, found.get("tensors")
    try:
        chat = format_of(found.get("chat"))
    except ValueError as error:
        raise bad(str(error)) from None
    return AdapterNote(*known_facts, form, chat)


def told_context(note: AdapterNote, arch: LlamaArch, context: int | None, folder: Path, must_tell: bool) -> int:
    """The context (tokens) that an adapter was trained for where that is told, else the one given, else the base's.

    Args:
        must_tell: the adapter is of a kind trained at a longer context than the base's.

    Raises:
        ConfigError: what is given contradicts what is told, or nothing tells the context although something must.
    """
    if context is not None and context < 2:
        raise ConfigError(f"--context: must be at least 2 tokens, got {context}; give the context it was trained for.")
    if note.context is not None and context not in (None, note.context):
        raise ConfigError(
            f"--context {context}: {folder / NOTE} says it was trained for {note.context}, and another RoPE would make "
            "it useless; leave --context out."
        )
    context = note.context if context is None else context
    if context is None and must_tell:
        raise ConfigError(
            f"--context: is missing, and {folder} has no {NOTE} that tells the context it was trained for; give it, "
            "e.g. --context 32768."
        )
    return arch.max_positions if context is None else context


def stretch(
    note: AdapterNote, arch: LlamaArch, context: int | None, rope: RopeSettings | None, folder: Path, must_tell: bool
) -> tuple[int, RopePlan]:
    """Context (tokens) and RoPE of the result: those it was trained with where they are told, else those given.

    Without either LongLoRA's rule holds: linear interpolation by the next whole factor.

    Args:
        must_tell: see `told_context`.

    Raises:
        ConfigError: what is given contradicts what is told, or nothing tells the context although something must.
    """
    context = told_context(note, arch, context, folder, must_tell)
    if note.plan is not None and note.context is not None:
        # A type alone says nothing of the factor; of `none` there is the base's theta and ntk's.
        same = rope is None or (rope == RopeSettings(type=note.plan.type) and note.plan.type != "none")
        if not same and rope is not None and plan_rope(arch, rope, note.context) != note.plan:
            raise ConfigError(
                f"--rope {rope.type}: {folder / NOTE} says it was trained with {note.plan.type}, factor "
                f"{note.plan.factor:g}, theta {note.plan.theta:g}; leave --rope and what belongs to it out."
            )
        return note.context, note.plan
    rope = rope or RopeSettings()
    original = rope.original_context or arch.max_positions
    if rope.type == "auto" and rope.factor is None and context > original and arch.rope_scaling is None:
        # From `original`, which may be less than the base declares.
        rope = dataclasses.replace(rope, type="linear", factor=float(-(-context // original)))
    elif arch.rope_scaling is None:
        rope.check_stretch(context)
    return context, plan_rope(arch, rope, context)


def _listed(entries: Any, module: str) -> bool:
    """PEFT's rule of target and exclude_modules: a name, the end of one, or a pattern of whole names."""
    if isinstance(entries, str):
        return re.fullmatch(entries, module) is not None
    return any(f".{module}".endswith(f".{entry}") for entry in entries)


def saved_whole(config: Mapping[str, Any], module: str) -> bool:
    """Whether `modules_to_save` names a module, by PEFT's rule: by any end of it, "norm" by that of input_layernorm."""
    return any(module.endswith(entry) for entry in config.get("modules_to_save") or ())


def adapted_modules(config: Mapping[str, Any], arch: LlamaArch, path: Path, fused: bool) -> set[str] | None:
    """Modules that adapter_config.json says are adapted; None where it does not say.

    Args:
        fused: it names them as a base with fused projections has them.

    Raises:
        CheckpointError: a pattern is none.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if targets is None:
        return None
    layers = range(arch.layers)
    # A module as the base has it -> ours.
    own = {module: [module] for module, _ in PROJECTIONS.values()}
    for module, parts in FUSED.items() if fused else ():
        own[module] = [inner for part in parts for inner in own.pop(PROJECTIONS[part][0])]
    plain = {f"model.layers.{layer}.{module}" for layer in layers for module in own}
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = sorted(plain)
    try:
        found = {
            module
            for module in plain.union(VOCABULARY_MODULES)
            if _listed(targets, module)
            and not _listed(excluded, module)
            and not any(f".{whole}." in f".{module}." for whole in config.get("modules_to_save") or ())
        }
    except re.error as error:
        raise CheckpointError(f"{path}: target_modules or exclude_modules is no pattern ({error}).") from None
    return found.intersection(VOCABULARY_MODULES).union(
        f"model.layers.{layer}.{inner}"
        for layer in layers
        for module, inners in own.items()
        for inner in inners
        if f"model.layers.{layer}.{module}" in found
    )


def check_complete(
    config: Mapping[str, Any],
    tensors: Iterable[str],
    arch: LlamaArch,
    note: AdapterNote,
    folder: Path,
    fused: bool = False,
) -> None:
    """Refuse an adapter that lacks what adapter_config.json or longspan.json says it has.

    Args:
        tensors: canonical names of all that was found.
        fused: see `adapted_modules`.

    Raises:
        CheckpointError: the first tensor that is missing, or there unannounced, is named.
    """
    found = set(tensors)
    mend = "copy or download the adapter again, or give the base it was trained on with --base"
    low, high = (
        {name.removesuffix(end) for name in found for end in ends if name.endswith(end)}
        for ends in zip(FACTORS, EMBEDDING_FACTORS, strict=True)
    )
    if not low | high:
        raise CheckpointError(f"{folder}: holds no LoRA tensor (*.lora_A.weight), so nothing was trained; {mend}.")
    wanted = adapted_modules(config, arch, folder / CONFIG, fused)
    if wanted is None:
        ends = {module.split(".", 3)[-1] for module in low | high}
        wanted = {f"model.layers.{layer}.{end}" for layer in range(arch.layers) for end in ends}
    missing = sorted(factor_names(module)[0] for module in wanted - low)
    missing += sorted(factor_names(module)[1] for module in wanted - high)
    if config.get("use_dora"):
        missing += sorted({module + MAGNITUDE for module in wanted} - found)
    if missing:
        raise CheckpointError(
            f"{folder}: lacks {missing[0]} ({len(missing)} of {2 * len(wanted)} LoRA tensors are missing), which "
            f"target_modules of {CONFIG} asks for; {mend}."
        )
    magnitudes = sorted(name for name in found if name.endswith(MAGNITUDE))
    if magnitudes and not config.get("use_dora"):
        raise CheckpointError(f"{folder}: holds {magnitudes[0]}, and {CONFIG} does not set use_dora; {mend}.")
    extra = sorted((low | high) - wanted)
    if extra:
        raise CheckpointError(
            f"{folder}: adapts {extra[0]}, which target_modules of {CONFIG} does not list, so the two files do not "
            f"belong together; {mend}."
        )
    for name in hf_tensor_shapes(arch):
        parts = name.split(".")
        owners = [".".join(parts[:end]) for end in range(1, len(parts))]
        if name not in found and any(saved_whole(config, owner) for owner in owners):
            raise CheckpointError(f"{folder}: lacks {name}, which modules_to_save of {CONFIG} asks for; {mend}.")
    if note.tensors is not None and note.tensors != len(found):
        raise CheckpointError(
            f"{folder}: holds {len(found)} trained tensors where {NOTE} counts {note.tensors}, so a file of it is "
            f"missing or another's; {mend}."
        )
