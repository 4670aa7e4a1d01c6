"""All ranks of a machine need host memory, and all refuse together where one finds too little."""

from __future__ import annotations

import re
from unittest import mock

from parallel.errors import ConfigError
from parallel.world.grid import plan_grid
from parallel.world.groups import destroy_groups, make_groups
from parallel.world.rank_env import RankEnv
from pipeline.evaluation.parked import check_parked
from tests.support.ranks import run_ranks

GIB = 2**30


def _checked(rank: int, world: int) -> list[str]:
    """What is said of 3 GiB a rank where 6 are left, 5 are left, and where only rank 1 sees 5."""
    groups, found = make_groups(plan_grid(world, 1, 1, 1), RankEnv.read()), []
    for left in (6, 5, 5 if rank == 1 else 6):
        with mock.patch("pipeline.evaluation.parked.host_left", lambda left=left: (left * GIB, "the job's limit")):
            try:
                check_parked(groups, 3 * GIB, "RULER", "lower its lengths")
                found.append("")
            except ConfigError as error:
                found.append(str(error))
    destroy_groups(keep_world=True)
    return found


def test_ranks_of_a_machine_are_counted_together_and_refuse_together() -> None:
    ranks = run_ranks(_checked, 2, timeout=120)
    for fits, short, one in ranks:
        assert fits == ""
        for said in (short, one):
            assert re.search(
                r"RULER: keys and values of 2 ranks on \S+ take up to 6\.0 GiB of host memory and the job's limit "
                r"leaves 5\.0 GiB; lower its lengths, or give the job more memory\.$",
                said,
            ), said
    assert ranks[0][2].startswith("rank 1: RULER"), "whose machine it is"
