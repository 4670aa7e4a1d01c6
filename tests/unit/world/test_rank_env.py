"""Who a process is, from torchrun's, Slurm's or MPI's variables, as those launchers document them."""

from __future__ import annotations

import os
import socket
import time

import pytest

from parallel.errors import ConfigError, LongspanError
from parallel.world import meeting
from parallel.world.meeting import open_store, refuse_unknown_host
from parallel.world.rank_env import PORTS, RankEnv, first_of

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[03-08]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-host-17@1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}


def read(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> RankEnv:
    """`RankEnv.read` in an environment of these rank variables and no others."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI", "MPI_", "MV2_", "MASTER_")) or name in TORCHRUN:
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return RankEnv.read()


def test_srun_and_mpirun_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    env = read(monkeypatch, SRUN)
    assert (env.rank, env.world_size, env.local_rank, env.launched) == (5, 8, 1, True)
    assert env.master_host == "gpu07" and PORTS[0] <= env.master_port < PORTS[1] and not env.agent_store
    other_rank = read(monkeypatch, SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert (other_rank.master_host, other_rank.master_port) == (env.master_host, env.master_port)
    step = read(monkeypatch, SRUN | {"SLURM_STEP_ID": "1"})
    assert step.master_port != env.master_port and step.job != env.job == other_rank.job, "two steps of a job"
    told = read(monkeypatch, SRUN | {"MASTER_ADDR": "ib0", "MASTER_PORT": "999", "WORLD_SIZE": "8"})
    assert (told.master_host, told.master_port, told.rank) == ("ib0", 999, 5), "a job script may say where"
    assert read(monkeypatch, SRUN | {"SLURM_STEP_NUM_NODES": "1"}).master_host == "127.0.0.1"
    env = read(monkeypatch, MPIRUN)
    assert (env.rank, env.world_size, env.local_rank, env.master_host) == (3, 4, 3, "127.0.0.1")
    env = read(monkeypatch, HYDRA)
    assert (env.rank, env.world_size, env.local_rank, env.master_port) == (1, 2, 1, 29500)


def test_torchrun_in_a_task_of_srun_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    env = read(monkeypatch, SRUN | MPIRUN | TORCHRUN)
    assert (env.rank, env.world_size, env.local_rank, env.master_host, env.master_port) == (1, 2, 1, "head", 1234)


def test_what_is_no_task_of_several_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """salloc's shell (a step of its own where Slurm is set up so), a batch script, one task."""
    batch = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for variables in (batch, batch | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, {"PMI_SIZE": "1"}):
        assert read(monkeypatch, variables) == RankEnv()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes, but OMPI_COMM_WORLD_RANK is not set"),
        (SRUN | {"WORLD_SIZE": "2"}, r"WORLD_SIZE is 2 but srun says 8 \(SLURM_STEP_NUM_TASKS\)"),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "on several machines, and MASTER_ADDR does not say"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK, LOCAL_RANK is not"),
        (SRUN | {"SLURM_PROCID": "x"}, "must be integers"),
    ],
)
def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(monkeypatch, variables)


def test_first_machine_of_slurms_list() -> None:
    lists = {
        "gpu7": "gpu7",
        "gpu[007-010,12],x1": "gpu007",
        "r[3,5]n[2-4]-ib": "r3n2-ib",
        "a,b[1-2]": "a",
        "": "",
    }
    assert {text: first_of(text) for text in lists} == lists


def test_a_meeting_place_that_cannot_be_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "RESOLVE_S", 0.1)
    began = time.monotonic()
    lost = RankEnv(1, 2, 1, launched=True, master_host="no.such.host.invalid")
    with pytest.raises(LongspanError, match=r"^Rank 1: MASTER_ADDR 'no\.such\.host\.invalid' does not resolve here"):
        open_store(lost, 600)
    assert time.monotonic() - began < 20
    refuse_unknown_host("127.0.0.1", "test")
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        taken = RankEnv(0, 2, 0, launched=True, master_port=port)
        with pytest.raises(LongspanError, match=rf"^Rank 0: port {port} of this machine is taken, .* MASTER_PORT to a"):
            open_store(taken, 5)
