"""The layouts of fused weights: which rows of q, k, v, gate and up make the matrix a rank multiplies with.

megatron-core fuses q, k and v into rows [q heads of KV group 0, k_0, v_0, q heads of group 1, ...], so that cutting
rows into equal parts cuts whole groups, and gate and up into [gate; up]. Which rows of a stored tensor these are,
without the tensors, is `planning.tensors.row_runs`.

Shapes: D head width, G KV groups, M query heads a group.
"""

from __future__ import annotations

import torch

from pipeline.planning.arch import LlamaArch


def fuse_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arch: LlamaArch) -> torch.Tensor:
    """Rows of q [G M D, ...], k and v [G D, ...] in megatron's order, [G (M + 2) D, ...].

    Works on weights, biases (1-D), LoRA's B factors and on whole groups of them (a tensor-parallel slice).

    Raises:
        ValueError: the row counts are not those of whole groups.
    """
    head_dim, per_group = arch.head_dim, arch.heads // arch.kv_heads
    groups = k.shape[0] // head_dim
    if k.shape != v.shape or groups * head_dim != k.shape[0] or q.shape[0] != groups * per_group * head_dim:
        raise ValueError(f"rows q {q.shape[0]}, k {k.shape[0]}, v {v.shape[0]} are not whole KV groups of {arch}")
    rest = q.shape[1:]
    blocks = (
        q.reshape(groups, per_group * head_dim, *rest),
        k.reshape(groups, head_dim, *rest),
        v.reshape(groups, head_dim, *rest),
    )
    return torch.cat(blocks, dim=1).reshape(-1, *rest)


def fuse_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[gate; up] along rows; weights, biases or LoRA's B factors of equal shape."""
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ in shape")
    return torch.cat((gate, up))
