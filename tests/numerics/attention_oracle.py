"""S²-Attn by its definition: for every head, query and key ask whether the query may see the key; dense fp64 softmax.

Shares nothing with the implementation: no segments, no views, no blocks.
"""

from __future__ import annotations

import numpy as np
import torch


def table(real: np.ndarray, document: np.ndarray, group: int | None, shifted: bool, dilation: int = 1) -> np.ndarray:
    """bool [S, S] of one row, [query, key]: the key is not later, in the query's document run, and in its group.

    Dilated heads are not shifted: their groups are as many times as long, and the key is a multiple of it away.
    """
    sequence = len(real)
    first = int(np.argmax(real))  # groups count from the first real token
    dilated = shifted and dilation > 1
    offset = group // 2 if group is not None and shifted and not dilated else 0
    group = group * dilation if group is not None and dilated else group
    result = np.zeros((sequence, sequence), bool)
    for query in range(sequence):
        for key in range(query, -1, -1):
            if document[key] != document[query]:
                break  # another document begins between here and the query; an equal id further back is a third one
            same_group = group is None or (query - first + offset) // group == (key - first + offset) // group
            met = not dilated or group is None or (query - key) % dilation == 0
            result[query, key] = real[query] and real[key] and same_group and met
    return result


def is_shifted(head: int, heads: int, kv_heads: int, rule: str) -> bool:
    """Shift of a global query head."""
    if rule == "upper_half":
        return head >= heads // 2
    if rule in ("none", "all"):
        return rule == "all"
    return (head * kv_heads // heads) % 2 == 1


def masks(
    batch: int,
    sequence: int,
    heads: int,
    kv_heads: int,
    group: int | None,
    rule: str = "upper_half",
    padding: np.ndarray | None = None,
    documents: np.ndarray | None = None,
    dilation: int = 1,
) -> torch.Tensor:
    """bool [B, H, S, S], True where attention is allowed."""
    result = np.zeros((batch, heads, sequence, sequence), bool)
    for row in range(batch):
        real = np.ones(sequence, bool) if padding is None else padding[row]
        document = np.zeros(sequence, int) if documents is None else documents[row]
        for shifted in (False, True):
            row_table = table(real, document, group, shifted, dilation)
            for head in range(heads):
                if is_shifted(head, heads, kv_heads, rule) == shifted:
                    result[row, head] = row_table
    return torch.from_numpy(result)


def attention(
    q_SBHD: torch.Tensor, k_SBHD: torch.Tensor, v_SBHD: torch.Tensor, mask_BHSS: torch.Tensor
) -> torch.Tensor:
    """Masked softmax attention, [S, B, Hq, D]; queries that see nothing give 0. In the inputs' dtype."""
    ratio = q_SBHD.shape[2] // k_SBHD.shape[2]
    k = k_SBHD.repeat_interleave(ratio, dim=2)
    v = v_SBHD.repeat_interleave(ratio, dim=2)
    scores = torch.einsum("qbhd,kbhd->bhqk", q_SBHD, k) * q_SBHD.shape[-1] ** -0.5
    mask = mask_BHSS.to(scores.device)
    weights = scores.masked_fill(~mask, -1e300 if scores.dtype == torch.float64 else -1e30).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights * mask, v)
