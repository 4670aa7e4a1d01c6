"""Who this process is among the launched ones. The only reader of torchrun's, Slurm's and MPI's variables."""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from parallel.errors import ConfigError

EXIT_FILE = "LONGSPAN_EXIT_FILE"
"""Environment variable: see `RankEnv.exit_file`."""
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
PORTS = (20000, 32000)
"""Where a port that follows from the job's name lies: below those that systems give to whoever asks for any."""


@dataclass(frozen=True)
class Launcher:
    """A launcher that tells its processes who they are in variables of its own."""

    name: str
    rank: str
    world: str
    local: str
    """Rank among those of this machine."""
    here: str
    """Variable of the number of processes on this machine, or `SLURM_STEP_NUM_NODES`."""
    job: tuple[str, ...]
    """Variables that together name the job: alike on all its ranks, unlike those of another job."""


# Slurm's come first: srun sets PMI's too. Not SLURM_NTASKS: salloc's shell and a batch script have it, alone.
LAUNCHERS = (
    Launcher(
        "srun",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_NUM_NODES",
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
    Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    Launcher(
        "mpirun",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        (),
    ),
    Launcher("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ("HYDRA_JOBID", "PMI_JOBID")),
)


@dataclass(frozen=True)
class RankEnv:
    """The launcher's coordinates of this process; a process started by hand is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launched: bool = False
    """True when a launcher (torchrun, srun, mpirun, tests) set the variables."""
    master_host: str = "127.0.0.1"
    """Where the ranks meet."""
    master_port: int = 29500
    """Where the ranks meet."""
    agent_store: bool = False
    """True when the launcher hosts the store the ranks meet at (torchrun does), False when rank 0 has to."""
    attempt: int = 0
    """How often the launcher has restarted the job."""
    job: str = ""
    """What the launcher calls the job, alike on all ranks; empty: nothing."""
    exit_file: str = ""
    """Where the launcher (tools.torchrun) reads the job's exit code, for torchrun makes a 1 of any; empty: nowhere."""

    @property
    def is_main(self) -> bool:
        """Whether this process speaks to the user and writes shared files."""
        return self.rank == 0

    @classmethod
    def read(cls) -> RankEnv:
        """Read RANK, WORLD_SIZE, LOCAL_RANK, and where the ranks meet; what torchrun has not set, from srun or mpirun.

        Raises:
            ConfigError: only some are known, or they contradict each other.
        """
        environment = dict(os.environ)
        found = {name: environment[name] for name in NAMES if name in environment}
        if len(found) < len(NAMES):
            other = _other_launcher(environment)
            if other is not None:
                return cls._launched({**environment, **_translated(other, environment, found)})
        if not found:
            return cls()
        missing = [name for name in NAMES if name not in found]
        if missing:
            raise ConfigError(
                f"Environment: {', '.join(found)} is set but {', '.join(missing)} is not; start with torchrun, "
                "or unset them for a single process."
            )
        return cls._launched(environment)

    @classmethod
    def _launched(cls, environment: Mapping[str, str]) -> RankEnv:
        """From torchrun's variables, all there."""
        found = {name: environment[name] for name in NAMES}
        try:
            rank, world, local = (int(found[name]) for name in NAMES)
            port = int(environment.get("MASTER_PORT", cls.master_port))
            attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", 0))
        except ValueError:
            raise ConfigError(
                f"Environment: RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT must be integers, got {found} and "
                f"MASTER_PORT {environment.get('MASTER_PORT')}."
            ) from None
        if not 0 <= rank < world:
            raise ConfigError(f"Environment: RANK {rank} is outside the world of {world} processes.")
        return cls(
            rank,
            world,
            local,
            launched=True,
            master_host=environment.get("MASTER_ADDR", cls.master_host),
            master_port=port,
            agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=attempt,
            job=environment.get("TORCHELASTIC_RUN_ID", ""),
            exit_file=environment.get(EXIT_FILE, ""),
        )


def _other_launcher(environment: Mapping[str, str]) -> Launcher | None:
    """Who started this process as one of several, if torchrun did not."""
    for launcher in LAUNCHERS:
        size = environment.get(launcher.world, "")
        if size.isdecimal() and int(size) > 1:
            return launcher
    return None


def _translated(launcher: Launcher, environment: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
    """A launcher's variables as torchrun's.

    Args:
        found: those of torchrun's that are set all the same, by a job script perhaps.

    Raises:
        ConfigError: some are missing, they contradict `found`, or nothing tells where the ranks meet.
    """
    world = environment[launcher.world]
    names = dict(zip(NAMES, (launcher.rank, launcher.world, launcher.local), strict=True))
    missing = [name for name in names.values() if name not in environment]
    if missing:
        raise ConfigError(
            f"Environment: {launcher.world} says that {launcher.name} started {world} processes, but {missing[0]} is "
            "not set; set RANK, WORLD_SIZE and LOCAL_RANK for each, or start with torchrun."
        )
    translated = {ours: environment[theirs] for ours, theirs in names.items()}
    for name, value in found.items():
        if value != translated[name]:
            raise ConfigError(
                f"Environment: {name} is {value} but {launcher.name} says {translated[name]} ({names[name]}); unset "
                f"{name}, or start with torchrun."
            )
    translated["MASTER_ADDR"] = environment.get("MASTER_ADDR") or _first_host(launcher, environment)
    if not translated["MASTER_ADDR"]:
        raise ConfigError(
            f"Environment: {launcher.name} started {world} processes on several machines, and MASTER_ADDR does not "
            "say where they meet; set it, on all of them, to the machine of rank 0."
        )
    job = " ".join(environment[name] for name in launcher.job if name in environment)
    if "MASTER_PORT" not in environment and job:
        low, high = PORTS
        translated["MASTER_PORT"] = str(low + zlib.crc32(job.encode()) % (high - low))
    return {**translated, "TORCHELASTIC_RUN_ID": job}


def _first_host(launcher: Launcher, environment: Mapping[str, str]) -> str:
    """The machine of rank 0; empty: nothing tells."""
    here = environment.get(launcher.here)
    if launcher.name == "srun":
        listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        return RankEnv.master_host if here == "1" else first_of(listed)
    return RankEnv.master_host if here == environment[launcher.world] else ""


def first_of(hosts: str) -> str:
    """First machine of Slurm's list: node007 of `node[007-010,12],gpu1`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", hosts)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


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
