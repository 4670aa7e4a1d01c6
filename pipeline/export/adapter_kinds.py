"""What PEFT's adapters may be beside plain LoRA of one rank on projections, which is what Longspan trains.

Adapters of projections that are fused in their base (Phi-3's), ranks and alphas by module (`rank_pattern`,
`alpha_pattern`), DoRA (arXiv 2402.09353), and LoRA of the embedding and the output matrix. They are merged as PEFT's
`merge_and_unload` does; nothing here trains or writes them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parallel.errors import CheckpointError
from pipeline.config.sections import LoraConfig
from pipeline.hf.fused import FUSED
from pipeline.planning.arch import LlamaArch
from pipeline.planning.tensors import PROJECTIONS, projection_shape

FACTORS = (".lora_A.weight", ".lora_B.weight")
EMBEDDING_FACTORS = (".lora_embedding_A", ".lora_embedding_B")
"""PEFT's of an embedding: A [r, V], B [H, r]."""
MAGNITUDE = ".lora_magnitude_vector"
"""DoRA's, one value an output row."""
VOCABULARY_MODULES = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class Own:
    """Rank and scale of a module's adapter where they are not the configuration's."""

    rank: int
    scale: float


def factor_names(module: str) -> tuple[str, str]:
    """Canonical names of a module's factors A and B."""
    low, high = EMBEDDING_FACTORS if module == "model.embed_tokens" else FACTORS
    return module + low, module + high


def module_of(name: str) -> str | None:
    """The module that a factor or magnitude belongs to; None: it is no tensor of an adapter."""
    for suffix in (*FACTORS, *EMBEDDING_FACTORS, MAGNITUDE):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return None


def canonical(name: str) -> str:
    """Our name of an adapter's tensor, whether PEFT wrote its adapter's name into it or not."""
    for suffix in (*EMBEDDING_FACTORS, MAGNITUDE):
        stem, found, rest = name.partition(suffix)
        if found and rest in ("", ".default", ".weight", ".default.weight"):
            return stem + suffix
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")


class _Apart(Mapping[str, torch.Tensor]):
    """Tensors of which some are rows of others."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], rows: Mapping[str, tuple[str, slice]]) -> None:
        self._tensors, self._rows = tensors, rows

    def __getitem__(self, name: str) -> torch.Tensor:
        stored, rows = self._rows[name]
        return self._tensors[stored][rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def taken_apart(tensors: Mapping[str, torch.Tensor], arch: LlamaArch, prefix: str) -> Mapping[str, torch.Tensor] | None:
    """An adapter's tensors for the base that an import makes of one with fused projections (`hf.fused`).

    The projections of a fused one share its factor A; of B and of DoRA's magnitudes each has its rows.

    Args:
        prefix: of PEFT's names.

    Returns:
        None: no fused projection is adapted.
    """
    found: dict[str, tuple[str, slice]] = {}
    fused = False
    for stored in tensors:
        name = canonical(stored.removeprefix(prefix))
        module = module_of(name) or ""
        parts = next((FUSED[end] for end in FUSED if module.endswith(f".{end}")), None)
        if parts is None:
            found[stored] = stored, slice(None)
            continue
        fused, first, leaf = True, 0, name.removeprefix(module)
        for part in parts:
            last = first + projection_shape(part, arch)[0]
            inner = ".".join([*module.split(".")[:3], PROJECTIONS[part][0]])
            found[inner + leaf] = stored, slice(None) if leaf == FACTORS[0] else slice(first, last)
            first = last
    return _Apart(tensors, found) if fused else None


def _fused_name(module: str) -> str:
    """What a projection's module is called in a base that keeps it fused; otherwise its own name."""
    for fused, parts in FUSED.items():
        for part in parts:
            own = PROJECTIONS[part][0]
            if module.endswith(f".{own}"):
                return module.removesuffix(own) + fused
    return module


def _by_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """PEFT's rule: the first key that is an end of the module's name, or a pattern of one."""
    for key, value in patterns.items():
        if any(re.match(rf"(.*\.)?({key})$", name) for name in (module, _fused_name(module))):
            return value
    return otherwise


def own_settings(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], lora: LoraConfig, path: Path
) -> dict[str, Own]:
    """Modules whose rank or scale is another than `lora`'s, and all of the vocabulary's.

    Args:
        config: adapter_config.json, read at `path`.
        tensors: by canonical name.

    Raises:
        CheckpointError: a pattern is none, or names another rank than the tensors have.
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    found = {}
    for module in sorted({module for name in tensors if (module := module_of(name)) is not None}):
        factor = factor_names(module)[0]
        if factor not in tensors:
            continue  # `check_complete` names it
        try:
            rank = int(_by_pattern(ranks, module, lora.rank))
            alpha = float(_by_pattern(alphas, module, lora.alpha))
        except (re.error, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: rank_pattern or alpha_pattern is no list of patterns and numbers ({error}); download it "
                "again."
            ) from None
        stored = tensors[factor].shape[0]
        if rank != stored or rank < 1:
            raise CheckpointError(
                f"{path}: gives {module} rank {rank}, and its tensors have {stored}, so the two files do not belong "
                "together; download both again."
            )
        own = Own(rank, alpha / (math.sqrt(rank) if lora.rslora else rank))
        if own != Own(lora.rank, lora.scale) or module in VOCABULARY_MODULES:
            found[module] = own
    return found


def own_shapes(arch: LlamaArch, own: Mapping[str, Own], dora: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of the tensors of adapters that are not plain.

    Args:
        dora: modules with magnitudes.
    """
    parts = {hf: part for part, (hf, _) in PROJECTIONS.items()}

    def size(module: str) -> tuple[int, int]:
        part = parts.get(".".join(module.split(".")[3:]))
        return (arch.vocab, arch.hidden) if part is None else projection_shape(part, arch)

    shapes: dict[str, tuple[int, ...]] = {}
    for module, each in own.items():
        rows, columns = size(module)
        low, high = factor_names(module)
        if module == "model.embed_tokens":
            rows, columns = columns, rows
        shapes |= {low: (each.rank, columns), high: (rows, each.rank)}
    return shapes | {module + MAGNITUDE: (size(module)[0],) for module in dora}


def refuse_vocabulary(tensors: Iterable[str], arch: LlamaArch, stored: int, dora: bool, folder: Path) -> None:
    """Refuse adapters of the vocabulary's matrices that PEFT computes otherwise than merged weights would, or resizes.

    Args:
        stored: rows of the base's embedding.

    Raises:
        CheckpointError: the base ties them, or rows were added beside them, or the embedding's is DoRA.
    """
    adapted = sorted({module for name in tensors if (module := module_of(name)) in VOCABULARY_MODULES})
    if not adapted:
        return
    mend = "merge this adapter with PEFT itself"
    if arch.tied:
        raise CheckpointError(
            f"{folder}: adapts {adapted[0]} alone, which the base ties to the other vocabulary matrix, so that merged "
            f"weights would compute something else; {mend}."
        )
    if arch.vocab != stored:
        raise CheckpointError(
            f"{folder}: adapts {adapted[0]} and has rows for added tokens, which is not supported; {mend}."
        )
    if dora and "model.embed_tokens" in adapted:
        raise CheckpointError(f"{folder}: adapts the embedding with DoRA, which is not supported; {mend}.")


def add_delta(
    base: torch.Tensor,
    left_OR: torch.Tensor,
    right_RI: torch.Tensor,
    scale: float,
    magnitude_O: torch.Tensor | None,
) -> torch.Tensor:
    """W + scale * left right, in fp32; with magnitudes m row r of it becomes m_r row / |row| (DoRA, equation 5)."""
    found = base.float() + scale * (left_OR @ right_RI)
    if magnitude_O is None:
        return found
    return (magnitude_O / torch.linalg.norm(found, dim=1))[:, None] * found
