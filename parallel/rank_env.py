"""Who this process is among the launched ones. The only reader of torchrun's variables."""

from __future__ import annotations

import os
from dataclasses import dataclass

from parallel.errors import ConfigError


@dataclass(frozen=True)
class RankEnv:
    """torchrun's coordinates of this process; a process started by hand is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launched: bool = False
    """True when a launcher (torchrun, srun wrapper, tests) set the variables."""

    @property
    def is_main(self) -> bool:
        """Whether this process speaks to the user and writes shared files."""
        return self.rank == 0

    @classmethod
    def read(cls) -> RankEnv:
        """Read RANK, WORLD_SIZE, LOCAL_RANK.

        Raises:
            ConfigError: only some are set, or they contradict each other.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        found = {name: os.environ[name] for name in names if name in os.environ}
        if not found:
            return cls()
        missing = [name for name in names if name not in found]
        if missing:
            raise ConfigError(
                f"Environment: {', '.join(found)} is set but {', '.join(missing)} is not; start with torchrun, "
                "or unset them for a single process."
            )
        try:
            rank, world, local = (int(found[name]) for name in names)
        except ValueError:
            raise ConfigError(f"Environment: RANK, WORLD_SIZE, LOCAL_RANK must be integers, got {found}.") from None
        if not 0 <= rank < world:
            raise ConfigError(f"Environment: RANK {rank} is outside the world of {world} processes.")
        return cls(rank, world, local, launched=True)
