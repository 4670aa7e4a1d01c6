"""One adapter over the attention kernels: cuDNN, torch's flash, the flash-attn packages (2 and 4), and plain math.

Every backend has `dense` on [B, S, H, D] views with equal query and key lengths, and may have `varlen` on packed
[T, H, D]; both are causal, aligned bottom-right, and take fewer KV heads than query heads. K and V are expanded only
inside torch's `math` kernel and for fp32 on CUDA (the memory-efficient kernel has no GQA). A backend with `lse` also
gives the parts from which `attend_pieces` merges attention over keys that lie in two tensors.

Shape suffixes: B segments, S tokens of a segment, T packed tokens, H heads, D head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from parallel.errors import ConfigError
from pipeline.config.sections import BACKENDS, FLASH
from pipeline.model.attention.flash_packages import package_backend
from pipeline.model.attention.kernel_types import Backend, Dense, LseKernel
from pipeline.model.layers.kernel_choice import kernels_for

HALF = (torch.float16, torch.bfloat16)

_aten = torch.ops.aten


@functools.lru_cache(maxsize=64)
def select_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The backend called `name` (attention.backend) for this device, dtype and head dimension.

    auto: on CUDA in half precision cuDNN where it can (measured fastest, docs/RESULTS.md), else flash; in fp32 the
    memory-efficient kernel, in fp64 math; on CPU torch's own choice. Under cudnn, irregular layouts go to torch's
    varlen (flash), and shapes cuDNN refuses (one token, say) to flash. Raises ConfigError where the device cannot do
    what is asked.
    """
    if name not in BACKENDS:
        raise ConfigError(f"attention.backend: {name!r} is not one of {', '.join(BACKENDS)}.")
    if name == "math":
        return Backend("math", _sdpa(SDPBackend.MATH), None)
    if device.type != "cuda":
        if name == "auto":
            return Backend("cpu", _sdpa(SDPBackend.FLASH_ATTENTION, SDPBackend.MATH), None, (_LSE_CPU,))
        raise ConfigError(
            f"attention.backend: {name} needs a CUDA device, but this is {device.type}; use auto or math."
        )
    if dtype not in HALF:
        if name == "auto" and dtype == torch.float32:
            return Backend("efficient", _efficient, None)
        if name == "auto":
            return Backend("math", _sdpa(SDPBackend.MATH), None)
        raise ConfigError(f"attention.backend: {name} needs bf16 or fp16, but the model runs in {dtype}; use auto.")
    if name in FLASH:
        return package_backend(name, device, head_dim)
    return _torch_half(name, device, dtype, head_dim)


def _torch_half(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    probe = torch.empty(1, 1, 128, head_dim, device=device, dtype=dtype)
    params = torch.backends.cuda.SDPAParams(probe, probe, probe, None, 0.0, True, False)
    has_flash = torch.backends.cuda.can_use_flash_attention(params)
    has_cudnn = torch.backends.cudnn.is_available() and torch.backends.cuda.can_use_cudnn_attention(params)
    # The varlen entry does not pad the head dimension as SDPA does.
    varlen = _torch_varlen if has_flash and head_dim % 8 == 0 else None
    if name in ("auto", "cudnn") and has_cudnn:
        kernels = (_LSE_CUDNN, _LSE_FLASH)
        return Backend("cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION), varlen, kernels)
    if name in ("auto", "flash") and has_flash:
        return Backend("flash", _sdpa(SDPBackend.FLASH_ATTENTION), varlen, (_LSE_FLASH,))
    if name == "auto":
        return Backend("efficient", _efficient, None)
    raise ConfigError(
        f"attention.backend: {name} cannot run head dimension {head_dim} in {dtype} on "
        f"{torch.cuda.get_device_name(device)}; use auto."
    )


def _sdpa(*kernels: SDPBackend) -> Dense:
    """torch's scaled_dot_product_attention restricted to `kernels`, in that order of preference."""

    def dense(q_BSHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor, scale: float) -> torch.Tensor:
        with sdpa_kernel(list(kernels), set_priority=len(kernels) > 1):
            out_BHSD = F.scaled_dot_product_attention(
                q_BSHD.transpose(1, 2),
                k_BSHD.transpose(1, 2),
                v_BSHD.transpose(1, 2),
                is_causal=True,
                scale=scale,
                enable_gqa=q_BSHD.shape[2] != k_BSHD.shape[2],
            )
        return out_BHSD.transpose(1, 2)

    return dense


def expand_groups(
    q_BSHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V with a head for every query head, for kernels without grouped-query attention."""
    ratio = q_BSHD.shape[2] // k_BSHD.shape[2]
    if ratio == 1:
        return k_BSHD, v_BSHD
    return k_BSHD.repeat_interleave(ratio, dim=2), v_BSHD.repeat_interleave(ratio, dim=2)


def _efficient(q_BSHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor, scale: float) -> torch.Tensor:
    """torch's memory-efficient kernel; it has no GQA, so K and V are expanded here."""
    k_BSHD, v_BSHD = expand_groups(q_BSHD, k_BSHD, v_BSHD)
    return _sdpa(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)(q_BSHD, k_BSHD, v_BSHD, scale)


def _torch_varlen(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    scale: float,
) -> torch.Tensor:
    # window (-1, 0) is this interface's spelling of causal.
    out = varlen_attn(q_THD, k_THD, v_THD, cu_q, cu_k, longest_q, longest_k, scale=scale, window_size=(-1, 0))
    assert isinstance(out, torch.Tensor)  # a tuple only when auxiliary outputs are asked for
    return out


def _params(q_BHSD: torch.Tensor, k_BHSD: torch.Tensor, causal: bool) -> torch.backends.cuda.SDPAParams:
    return torch.backends.cuda.SDPAParams(q_BHSD, k_BHSD, k_BHSD, None, 0.0, causal, q_BHSD.shape[1] != k_BHSD.shape[1])


def _cudnn_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, ...]:
    # bias None, log-sum-exps True, dropout 0, no debug mask
    return _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[:8]


def _cudnn_backward(
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
    cum_q, cum_k, longest_q, longest_k, seed, offset = rest
    args = (seed, offset, None, cum_q, cum_k, longest_q, longest_k, 0.0, causal)
    return _aten._scaled_dot_product_cudnn_attention_backward(dout, q, k, v, out, lse, *args, scale=scale)


def _flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, ...]:
    return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:8]


def _flash_backward(
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
    cum_q, cum_k, longest_q, longest_k, seed, offset = rest
    args = (cum_q, cum_k, longest_q, longest_k, 0.0, causal, seed, offset)
    return _aten._scaled_dot_product_flash_attention_backward(dout, q, k, v, out, lse, *args, scale=scale)


def _cpu_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, ...]:
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(
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
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)


_LSE_CUDNN = LseKernel(
    "cudnn",
    lambda q, k, causal: torch.backends.cuda.can_use_cudnn_attention(_params(q, k, causal)),
    _cudnn_forward,
    _cudnn_backward,
)
_LSE_FLASH = LseKernel(
    "flash",
    # The operator itself, unlike SDPA, does not pad the head dimension.
    lambda q, k, causal: q.shape[-1] % 8 == 0 and torch.backends.cuda.can_use_flash_attention(_params(q, k, causal)),
    _flash_forward,
    _flash_backward,
)
_LSE_CPU = LseKernel("cpu", lambda q, k, causal: True, _cpu_forward, _cpu_backward)


def merge_outputs(
    early_out: torch.Tensor, early_lse: torch.Tensor, own_out: torch.Tensor, own_lse: torch.Tensor, fused: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [B, H, S, D] over both sets of keys, in the strides and dtype of `own_out`, and its log-sum-exps."""
    plain = fused and own_out.stride(-1) == early_out.stride(-1) == 1 and own_lse.dtype is torch.float32
    if plain and kernels_for(own_out, early_lse, own_lse) is not None:
        from pipeline.model.attention import merge_kernel  # imports triton, which not every machine has

        return merge_kernel.merge(early_out, early_lse, own_out, own_lse)
    share = torch.sigmoid(early_lse - own_lse)  # exp(early) / (exp(early) + exp(own))
    share = share.view(*own_out.shape[:3], 1)
    # fp32 for half precision; empty_like keeps the kernel's strides, which its backward expects of `out`.
    merged = torch.lerp(own_out.to(share.dtype), early_out.to(share.dtype), share)
    return torch.empty_like(own_out).copy_(merged), torch.logaddexp(early_lse, own_lse)


class _Pieces(torch.autograd.Function):
    """softmax over earlier keys (all seen) and own keys (causal square), merged through the two log-sum-exps.

    Both backward calls get the merged output and log-sum-exps, so that each recomputes the true probabilities of its
    keys: exp(score - lse), and rowsum(dout * out) is that of the whole softmax (FlashAttention-2, arXiv 2307.08691).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        early_k: torch.Tensor,
        early_v: torch.Tensor,
        own_k: torch.Tensor,
        own_v: torch.Tensor,
        kernel: LseKernel,
        scale: float,
        fused: bool,
    ) -> torch.Tensor:
        early_out, early_lse, *early_rest = kernel.forward(q, early_k, early_v, False, scale)
        own_out, own_lse, *own_rest = kernel.forward(q, own_k, own_v, True, scale)
        out, lse = merge_outputs(early_out, early_lse, own_out, own_lse, fused)
        tensors = [item for item in (*early_rest, *own_rest) if isinstance(item, torch.Tensor)]
        ctx.save_for_backward(q, early_k, early_v, own_k, own_v, out, lse, *tensors)
        # None marks a tensor's place; what is no tensor stays as it is.
        ctx.rest = tuple(
            tuple((isinstance(item, torch.Tensor), None if isinstance(item, torch.Tensor) else item) for item in rest)
            for rest in (early_rest, own_rest)
        )
        ctx.kernel, ctx.scale = kernel, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, early_k, early_v, own_k, own_v, out, lse, *tensors = ctx.saved_tensors
        early_rest, own_rest = (
            tuple(tensors.pop(0) if is_tensor else value for is_tensor, value in rest) for rest in ctx.rest
        )
        run, scale = ctx.kernel.backward, ctx.scale
        early_dq, early_dk, early_dv = run(dout, q, early_k, early_v, out, lse, early_rest, False, scale)
        dq, own_dk, own_dv = run(dout, q, own_k, own_v, out, lse, own_rest, True, scale)
        return dq.add_(early_dq), early_dk, early_dv, own_dk, own_dv, None, None, None


def attend_pieces(
    q_BSHD: torch.Tensor,
    early_k_BTHD: torch.Tensor,
    early_v_BTHD: torch.Tensor,
    own_k_BSHD: torch.Tensor,
    own_v_BSHD: torch.Tensor,
    kernel: LseKernel,
    scale: float,
    fused: bool = True,
) -> torch.Tensor:
    """Attention of queries [B, Sq, Hq, D] to T earlier keys (all seen) and their own Sq keys (causal), [B, Sq, Hq, D].

    Equals bottom-right causal attention over the joined keys [B, T + Sq, Hkv, D]; nothing is joined, no mask is made.
    """
    views = [x.transpose(1, 2) for x in (q_BSHD, early_k_BTHD, early_v_BTHD, own_k_BSHD, own_v_BSHD)]
    return _Pieces.apply(*views, kernel, scale, fused).transpose(1, 2)
