"""The one-process groups that in-process tests share (megatron's state is global, so it is made once a process)."""

from __future__ import annotations

from functools import cache

from parallel.groups import Groups, make_groups
from parallel.plan import plan_grid
from parallel.rank_env import RankEnv
from parallel.rng import seed_everything


@cache
def single_groups() -> Groups:
    """Rank 0 of 1, seeded."""
    groups = make_groups(plan_grid(1, 1, 1, 1), RankEnv())
    seed_everything(0)
    return groups
