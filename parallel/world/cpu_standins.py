"""Stand-ins that let megatron-core run on CPU with gloo. With `lone_rank`, all that patches anything.

megatron-core calls `torch.cuda` unconditionally in places a CPU run reaches (parameter devices, the RNG tracker,
activation checkpointing). `install()` supplies what those calls need; it does nothing where CUDA is present, and
refuses a megatron-core it was not checked against, since a silent mismatch here would be a silent wrong result.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from parallel.errors import LongspanError

CHECKED_VERSIONS = ("0.19.2",)
"""megatron-core releases these stand-ins were run with."""

_installed = False


def _no_triton_module() -> None:
    """megatron-core 0.19 imports a triton kernel module unconditionally; without triton give it an inert one."""
    name = "megatron.core.transformer.moe.ops.paged_stash"
    if importlib.util.find_spec("triton") is None and name not in sys.modules:
        module = types.ModuleType(name)
        for attribute, value in (
            ("GLOBAL_BLOCK_SIZE", 1024),
            ("paged_stash_copy_kernel", None),
            ("paged_stash_pop_kernel", None),
        ):
            setattr(module, attribute, value)
        sys.modules[name] = module


class _NullStream:
    """Stands in for torch.cuda.Stream and Event: every method is a no-op."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


class _TorchOnCpu:
    """Stands in for the name `torch` inside one megatron module that writes device="cuda": there it means the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """torch.zeros with a CUDA device replaced."""
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        return torch.zeros(*args, **kwargs)


def _noop(*args: object, **kwargs: object) -> None: ...


def _cpu_stand_ins() -> dict[str, Any]:
    """What replaces each `torch.cuda` attribute."""
    return {
        "current_device": lambda: torch.device("cpu"),
        "synchronize": _noop,
        "empty_cache": _noop,
        "set_device": _noop,
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.random.default_generator.manual_seed(seed),
        "Stream": _NullStream,
        "Event": _NullStream,
        "current_stream": lambda *a, **k: _NullStream(),
        "stream": lambda *a, **k: contextlib.nullcontext(),
    }


def install() -> bool:
    """Make megatron-core usable without CUDA; idempotent.

    Returns:
        True if stand-ins are active, False where CUDA is present (nothing is touched then).

    Raises:
        LongspanError: megatron-core is of a version these stand-ins were not checked with.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True
    version = importlib.metadata.version("megatron-core")
    if version not in CHECKED_VERSIONS:
        raise LongspanError(
            f"megatron-core {version} was never checked on CPU; install megatron-core=={CHECKED_VERSIONS[-1]} "
            "(launch/setup.sh does)."
        )
    _no_triton_module()
    for name, value in _cpu_stand_ins().items():
        setattr(torch.cuda, name, value)
    import megatron.core.pipeline_parallel.schedules as schedules  # after the triton stand-in, which its import needs
    import megatron.core.tensor_parallel.random as tracker

    schedules.torch = _TorchOnCpu()
    tracker._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    tracker._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    # Its complaint that the CPU's random state changed where only the GPU's should: here it is the one that should.
    logging.getLogger(tracker.__name__).addFilter(lambda record: "CPU RNG state" not in record.getMessage())
    _installed = True
    return True
