from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class ContextShard:
    group: dist.ProcessGroup
    rank: int
    size: int
    tokens: int
