"""Who this process is among the launched ones. The only reader of torchrun's variables."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from parallel.errors import ConfigError

EXIT_FILE = "LONGSPAN_EXIT_FILE"
"""Environment variable: see `RankEnv.exit_file`."""


@dataclass(frozen=True)
class RankEnv:
    """torchrun's coordinates of this process; a process started by hand is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launched: bool = False
    """True when a launcher (torchrun, srun wrapper, tests) set the variables."""
    master_host: str = "127.0.0.1"
    """Where the ranks meet."""
    master_port: int = 29500
    """Where the ranks meet."""
    agent_store: bool = False
    """True when the launcher hosts the store the ranks meet at (torchrun does), False when rank 0 has to."""
    attempt: int = 0
    """How often the launcher has restarted the job."""
    exit_file: str = ""
    """Where the launcher (tools.torchrun) reads the job's exit code, for torchrun makes a 1 of any; empty: nowhere."""

    @property
    def is_main(self) -> bool:
        """Whether this process speaks to the user and writes shared files."""
        return self.rank == 0

    @classmethod
    def read(cls) -> RankEnv:
        """Read RANK, WORLD_SIZE, LOCAL_RANK, and where the ranks meet.

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
            port = int(os.environ.get("MASTER_PORT", cls.master_port))
            attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        except ValueError:
            raise ConfigError(
                f"Environment: RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT must be integers, got {found} and "
                f"MASTER_PORT {os.environ.get('MASTER_PORT')}."
            ) from None
        if not 0 <= rank < world:
            raise ConfigError(f"Environment: RANK {rank} is outside the world of {world} processes.")
        return cls(
            rank,
            world,
            local,
            launched=True,
            master_host=os.environ.get("MASTER_ADDR", cls.master_host),
            master_port=port,
            agent_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=attempt,
            exit_file=os.environ.get(EXIT_FILE, ""),
        )


@contextlib.contextmanager
def local_rank_exported(env: RankEnv) -> Iterator[None]:
    """Within, LOCAL_RANK is set where no launcher has set it: DeepSpeed reads it. Left behind, it would make the next
    `RankEnv.read` of this process refuse a half-set environment."""
    missing = "LOCAL_RANK" not in os.environ
    if missing:
        os.environ["LOCAL_RANK"] = str(env.local_rank)
    try:
        yield
    finally:
        if missing:
            del os.environ["LOCAL_RANK"]
