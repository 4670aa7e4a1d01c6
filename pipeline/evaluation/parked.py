"""Host memory for the keys and values that wait while a window passes in chunks: refused before it is spent."""

from __future__ import annotations

import socket

from parallel.errors import ConfigError
from parallel.world.collectives import agree, of_every_rank
from parallel.world.groups import Groups
from pipeline.planner.host_memory import host_left


def check_parked(groups: Groups, size: int, what: str, mend: str) -> None:
    """Return if this machine has room for what its ranks will keep; collective.

    Args:
        size: bytes of a rank, at most.
        what: that keeps them.
        mend: what makes it less.

    Raises:
        ConfigError: one sentence, on every rank.
    """
    here = socket.gethostname()
    ranks = sum(1 for _, machine in of_every_rank(groups, []) if machine == here)
    left, whose = host_left()
    problem = None
    if ranks * size > left:
        problem = (
            f"{what}: keys and values of {ranks} rank{'s' * (ranks > 1)} on {here} take up to "
            f"{ranks * size / 2**30:.1f} GiB of host memory and {whose} leaves {left / 2**30:.1f} GiB; {mend}, or give "
            "the job more memory."
        )
    _, told = agree(groups, [], problem)
    if told is not None:
        raise ConfigError(told)
