"""The one-process groups that in-process tests share (megatron's state is global, so it is made once at a time)."""

from __future__ import annotations

import torch.distributed as dist

from parallel.world.grid import plan_grid
from parallel.world.groups import Groups, make_groups
from parallel.world.rank_env import RankEnv
from parallel.world.rng import seed_everything

_made: list[Groups] = []


def single_groups() -> Groups:
    """Rank 0 of 1, seeded; made anew if a test tore the last one down."""
    if not _made or not dist.is_initialized():
        _made[:] = [make_groups(plan_grid(1, 1, 1, 1), RankEnv())]
        seed_everything(0)
    return _made[0]
