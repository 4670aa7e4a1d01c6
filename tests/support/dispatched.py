"""What PyTorch is handed for a layer's forward and backward, counted on a CPU: under Triton's interpreter only.

The model is the one that runs on a GPU, its sizes small: every Triton kernel counts as one operation and computes
nothing, and a product in 8 bits is one too.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pipeline.model.layers
from parallel.world.groups import destroy_groups, make_groups
from parallel.world.rank_env import RankEnv
from parallel.world.rng import seed_everything
from pipeline.build import build_model
from pipeline.data.loader import Batch
from pipeline.model.layers import quantized_weight
from pipeline.model.weights.load import mark_trainable
from pipeline.planning import tile_size
from pipeline.planning.run_plan import RunPlan
from tools.support.plan_points import Point
from tools.support.random_base import RandomBase

TOKENS = 256


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += 1
        return func(*args, **(kwargs or {}))


def _as_on_a_gpu() -> None:
    """For the rest of this process: kernels are chosen, and only counted."""
    from triton.runtime import interpreter

    from pipeline.model.layers import fp8_kernels, triton_kernels

    def kernels_for(first: torch.Tensor, *others: torch.Tensor) -> Any:
        return triton_kernels if all(tensor.is_contiguous() for tensor in others) else None

    def fp8_kernels_for(first: torch.Tensor, *others: torch.Tensor) -> Any:
        return fp8_kernels if kernels_for(first, *others) else None

    for found in pkgutil.iter_modules(pipeline.model.layers.__path__, "pipeline.model.layers."):
        importlib.import_module(found.name)
    for name, module in list(sys.modules.items()):
        if name.startswith("pipeline.model") and hasattr(module, "kernels_for"):
            module.kernels_for = kernels_for  # type: ignore[attr-defined]
        if name.startswith("pipeline.model") and hasattr(module, "fp8_kernels_for"):
            module.fp8_kernels_for = fp8_kernels_for  # type: ignore[attr-defined]

    def times(rows: Any, matrix: torch.Tensor, scales: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        if out is not None and out.is_contiguous():
            return out.zero_()
        made = torch.zeros(len(rows.values), len(matrix), dtype=torch.bfloat16).view(*rows.leading, -1)
        return made if out is None else out.copy_(made.view(out.shape))

    quantized_weight._times = times  # type: ignore[assignment]
    interpreter.InterpretedFunction.run = launch  # type: ignore[method-assign]


_counter = _Counter()


def launch(*_: Any, **__: Any) -> None:
    """In the place of every Triton kernel."""
    _counter.found += 1


def _operations(base: str, tp: int, recompute: str, tiles: int, layers: int) -> int:
    settings = {"base": base, "tp": tp, "recompute": recompute}
    given = Point("count", "llama2-70b", tp, TOKENS, settings, "held").plan()
    sizes = {"hidden": 256, "ffn": 512, "heads": 16, "kv_heads": 8, "head_dim": 16, "vocab": 64}
    arch = replace(given.arch, layers=layers, **sizes)
    config = replace(given.config, model=replace(given.config.model, dtype="bf16"))
    plan = RunPlan.shaped(config, arch, tp)
    groups = make_groups(plan.grid, RankEnv(rank=0, world_size=tp), fake=tp > 1)
    seed_everything(0)
    few = TOKENS // tiles // min(2, tp)
    try:
        with mock.patch.object(tile_size, "LEAST_TOKENS", few), mock.patch.object(tile_size, "TILE_ELEMENTS", 1):
            model = build_model(plan, config.lora, groups, RandomBase(arch)).train()
            mark_trainable(model, config.train.trainable)
            batch = Batch(*[torch.randint(0, arch.vocab, (1, TOKENS))] * 2, None)
            for _ in range(2):  # the first makes what the others find
                _counter.found = 0
                with _counter:
                    model.train_step([batch], plan.attention, 1.0, lambda *_: None)
            return _counter.found
    finally:
        destroy_groups()


def operations(base: str, tp: int, recompute: str, tiles: int) -> int:
    """Of one layer, forward and backward.

    Args:
        base: model.base.
        tp: tensor-parallel ranks.
        recompute: its policy.
        tiles: that its products are made in.
    """
    _as_on_a_gpu()
    return _operations(base, tp, recompute, tiles, 3) - _operations(base, tp, recompute, tiles, 2)
