"""The flash-attn packages: release 2 (CUDA C++, `flash_attn`) and release 4 (CuTe, `flash_attn.cute`).

Neither is a dependency, and both may be installed: they share the name `flash_attn` and nothing else. What is called of
them, public and (for log-sum-exps) not, tests/unit/model/test_flash_attn_package.py holds against their own sources.

Shape suffixes as in `backends`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from parallel.errors import ConfigError
from pipeline.model.attention.kernel_types import Backend, LseKernel
from pipeline.reporting.versions import installed

OLDEST_2 = (2, 1)
"""Since 2.1 causal masks are aligned bottom-right."""
LSE_2 = (2, 8)
"""Since then flash-attn 2's inner functions are called as here; older ones attend to joined keys instead."""
ALIGNED = 8
"""Head dimensions are multiples of it, 16 bytes: the inner functions do not pad as release 2's public ones do."""
WIDEST_2 = 256
"""Head dimension, of release 2."""
WIDEST_4 = {9: (256,), 10: (128, 256), 11: (128, 256), 12: (128,)}
"""By major compute capability, those that release 4 has backward kernels for: the widest head dimension, and one more
that has kernels of its own."""


def package_backend(name: str, device: torch.device, head_dim: int) -> Backend:
    """The release that `name`, one of FLASH, means on this device.

    Raises:
        ConfigError: it is not installed, does not load, or cannot run here.
    """
    major = torch.cuda.get_device_capability(device)[0]
    four, two = installed("flash-attn-4"), installed("flash-attn")
    if name != "flash_attn_2" and four is not None and _runs_4(major, head_dim):
        return _four(f"flash-attn-4 {four}")
    if name == "flash_attn_4":
        hint = "it is not installed" if four is None else _needs_4(major, head_dim)
        raise ConfigError(f"attention.backend: flash_attn_4 cannot be used, {hint}; install flash-attn-4 or use auto.")
    if two is None:
        hint = "it is not installed" if four is None or name == "flash_attn_2" else _needs_4(major, head_dim)
        raise ConfigError(f"attention.backend: {name} cannot be used, {hint}; install flash-attn 2 or use auto.")
    # 2.2rc1 counts as 2.2; a name without numbers as older than any.
    release = tuple(int(part) for part in re.findall(r"\d+", two)[:2])
    if release < OLDEST_2:
        raise ConfigError(f"attention.backend: flash-attn {two} is too old; install 2.1 or newer, or use auto.")
    if major < 8:
        raise ConfigError(f"attention.backend: flash-attn {two} needs compute capability 8 or newer; use auto.")
    if head_dim > WIDEST_2:
        raise ConfigError(
            f"attention.backend: flash-attn {two} has no kernel for head dimension {head_dim}, {WIDEST_2} at most; use "
            "auto."
        )
    return _two(f"flash-attn {two}", release >= LSE_2)


def _runs_4(major: int, head_dim: int) -> bool:
    widest, *more = WIDEST_4.get(major, (0,))
    return head_dim % ALIGNED == 0 and (head_dim <= widest or head_dim in more)


def _needs_4(major: int, head_dim: int) -> str:
    if major not in WIDEST_4:
        return f"it needs compute capability {min(WIDEST_4)} to {max(WIDEST_4)}"
    return f"it has no kernel for head dimension {head_dim} here"


def _import(title: str, *names: str) -> list[ModuleType]:
    # Imported on request only: optional, slow to load, and compiled against one torch version.
    try:
        return [importlib.import_module(name) for name in names]
    except (ImportError, OSError, AttributeError) as error:
        raise _broken(title, error) from error


def _broken(title: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"attention.backend: {title} is installed but does not load ({error}); reinstall it or use auto."
    )


def _two(title: str, has_lse: bool) -> Backend:
    module, inner = _import(title, "flash_attn", "flash_attn.flash_attn_interface")
    return _backend(title, module, (_lse_2(title, inner),) if has_lse else ())


def _four(title: str) -> Backend:
    module, inner = _import(title, "flash_attn.cute", "flash_attn.cute.interface")
    return _backend(title, module, (_lse_4(title, inner),))


def _backend(title: str, module: ModuleType, lse: tuple[LseKernel, ...]) -> Backend:
    try:
        dense_kernel, varlen_kernel = module.flash_attn_func, module.flash_attn_varlen_func
    except AttributeError as error:
        raise _broken(title, error) from error

    def only_output(result: Any) -> torch.Tensor:
        return result[0] if isinstance(result, tuple) else result  # release 4 adds the log-sum-exp

    def dense(q_BSHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor, scale: float) -> torch.Tensor:
        return only_output(dense_kernel(q_BSHD, k_BSHD, v_BSHD, softmax_scale=scale, causal=True))

    def varlen(
        q_THD: torch.Tensor,
        k_THD: torch.Tensor,
        v_THD: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        longest_q: int,
        longest_k: int,
        scale: float,
    ) -> torch.Tensor:
        return only_output(
            varlen_kernel(
                q_THD,
                k_THD,
                v_THD,
                cu_seqlens_q=cu_q,
                cu_seqlens_k=cu_k,
                max_seqlen_q=longest_q,
                max_seqlen_k=longest_k,
                softmax_scale=scale,
                causal=True,
            )
        )

    return Backend("flash_attn", dense, varlen, lse)


Tensors = tuple[torch.Tensor, ...]


def _turned(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[B, H, S, D] views as [B, S, H, D] ones, and back."""
    return [tensor.transpose(1, 2) for tensor in tensors]


def _lse(name: str, run: Callable[..., Tensors], back: Callable[..., Sequence[torch.Tensor]]) -> LseKernel:
    """A kernel of calls whose tensors are [B, S, H, D].

    Args:
        run: (q, k, v, causal, scale) -> (out, log-sum-exps, rest for the backward...).
        back: ((dout, q, k, v, out), log-sum-exps, that rest, causal, scale) -> (dq, dk, dv).
    """

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> Tensors:
        out, *rest = run(*_turned(q, k, v), causal, scale)
        return out.transpose(1, 2), *rest

    def backward(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        rest: tuple[Any, ...],
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = _turned(*back(_turned(dout, q, k, v, out), lse, rest, causal, scale))
        return dq, dk, dv

    return LseKernel(name, lambda q, k, causal: q.shape[-1] % ALIGNED == 0, forward, backward)


def _lse_2(title: str, inner: ModuleType) -> LseKernel:
    """Release 2's inner functions: (-1, -1) is no window, 0.0 no dropout and no cap, None no ALiBi."""
    try:
        forward, backward = inner._flash_attn_forward, inner._flash_attn_backward
    except AttributeError as error:
        raise _broken(title, error) from error

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> Tensors:
        out, lse, _, state = forward(q, k, v, 0.0, scale, causal, -1, -1, 0.0, None, False)
        return out, lse, state

    def back(tensors: Tensors, lse: torch.Tensor, rest: tuple[Any, ...], causal: bool, scale: float) -> Tensors:
        (state,) = rest
        # Contiguous whatever the views are, as the kernel wants what it writes.
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors[1:4])
        backward(*tensors, lse, *grads, 0.0, scale, causal, -1, -1, 0.0, None, False, state)
        return grads

    return _lse("flash_attn_2", run, back)


def _lse_4(title: str, inner: ModuleType) -> LseKernel:
    """Release 4's inner functions; no window is their default, which is None here and not -1."""
    try:
        forward, backward = inner._flash_attn_fwd, inner._flash_attn_bwd
    except AttributeError as error:
        raise _broken(title, error) from error

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> Tensors:
        out, lse, *_ = forward(q, k, v, softmax_scale=scale, causal=causal, return_lse=True)
        return out, lse

    def back(tensors: Tensors, lse: torch.Tensor, rest: tuple[Any, ...], causal: bool, scale: float) -> Tensors:
        dout, q, k, v, out = tensors
        dq, dk, dv = backward(q, k, v, out, dout, lse, softmax_scale=scale, causal=causal)
        return dq, dk, dv

    return _lse("flash_attn_4", run, back)
