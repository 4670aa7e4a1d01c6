"""Process groups, made once from the plan and passed in everywhere. The only reader of megatron's `parallel_state`."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import resource
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.errors import ConfigError
from parallel.world import cpu_standins
from parallel.world.agreement import require_alike
from parallel.world.context_shard import ContextShard
from parallel.world.grid import Coordinates, GridPlan
from parallel.world.late_compile import late
from parallel.world.lone_rank import stand_in
from parallel.world.meeting import arrive
from parallel.world.rank_env import RankEnv

# At its import megatron warns of optional packages that this product does not use.
warnings.filterwarnings("ignore", module="megatron")
with late():
    cpu_standins.install()  # before megatron.core: without triton its import needs the stand-in

    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

START = datetime.timedelta(minutes=10)
"""Time the last rank may come after the first."""


@dataclass(frozen=True)
class Groups:
    """This rank's place in the grid and its process groups."""

    env: RankEnv
    plan: GridPlan
    device: torch.device
    collection: ProcessGroupCollection
    """megatron-core's bundle, handed to its layers."""
    data: dist.ProcessGroup
    """Ranks holding the same shard of the model and different tokens (dp x cp)."""
    replicas: dist.ProcessGroup
    """Ranks holding the same shard of the model and of the sequences, and different sequences (dp)."""
    model: dist.ProcessGroup
    """Ranks that hold one replica of the model between them (tp x pp)."""
    host: dist.ProcessGroup
    """All ranks, for tensors in host memory (gloo)."""
    fake: bool = False
    """The other ranks are not there (see `make_groups`)."""

    @property
    def coordinates(self) -> Coordinates:
        """Where this rank stands."""
        return self.plan.coordinates(self.env.rank)

    @property
    def data_rank(self) -> int:
        """Index of this rank among the data-parallel replicas."""
        return self.coordinates.dp

    @property
    def stage(self) -> int:
        """This rank's pipeline stage."""
        return self.coordinates.pp

    def stage_rank(self, stage: int) -> int:
        """Global rank of this rank's counterpart on pipeline stage `stage`, modulo their number."""
        here = self.coordinates
        return self.plan.rank(here.tp, here.cp, here.dp, stage % self.plan.pp)

    def context_shard(self, tokens: int) -> ContextShard | None:
        """This rank's `tokens` tokens of a sequence under context parallelism; None without it."""
        if self.plan.cp == 1:
            return None
        return ContextShard(self.collection.cp, self.coordinates.cp, self.plan.cp, tokens)

    @property
    def is_main(self) -> bool:
        """Whether this process speaks to the user and writes shared files."""
        return self.env.is_main

    @property
    def everyone(self) -> dist.ProcessGroup:
        """All ranks of the world."""
        world = dist.group.WORLD
        assert world is not None, "make_groups has initialized it"
        return world

    def barrier(self) -> None:
        """Wait for every rank of the world."""
        if self.plan.world_size > 1:
            dist.barrier(group=self.host)


def _own_device(env: RankEnv) -> torch.device:
    """This process's GPU, made current; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if env.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK is {env.local_rank}, and this process sees {torch.cuda.device_count()} GPUs: start one "
            "process a GPU, each seeing all GPUs of its machine (torchrun --nproc-per-node, srun --gpus-per-node)."
        )
    device = torch.device("cuda", env.local_rank)
    torch.cuda.set_device(device)
    return device


def _allow_files() -> None:
    """As many open files as the system lets this process have: a socket a peer, several times over."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


_meetings = itertools.count()
"""Every rank makes groups in the same order, so the count names a meeting alike everywhere."""


def _compare(store: dist.Store, env: RankEnv, device: torch.device, facts: Mapping[str, str] | None) -> None:
    """Before the first collective: under other settings ranks would stand in different ones, and hang."""
    if facts is not None:
        compared = {**facts, "device": device.type}
        require_alike(store, env.rank, env.world_size, f"meeting-{next(_meetings)}", compared, START)


def make_groups(
    plan: GridPlan,
    env: RankEnv,
    timeout_s: float = 600.0,
    virtual: int = 1,
    fake: bool = False,
    facts: Mapping[str, str] | None = None,
) -> Groups:
    """Initialize torch.distributed (NCCL on CUDA, gloo on CPU) and megatron's groups.

    A single process that nobody launched uses an in-memory store, so that no port is opened.

    Args:
        plan: axis sizes; their product equals `env.world_size`.
        env: this process's rank.
        timeout_s: seconds after which a collective gives up.
        virtual: pipeline chunks a rank, more than one for the interleaved schedule.
        fake: be one rank of a world that is not there (torch's fake process group): memory and compute are real,
            nothing is sent, results mean nothing. For measuring and planning.
        facts: what all ranks must have alike, compared before a group is made; None: nothing is.

    Raises:
        ConfigError: this machine lacks the process's GPU, or the ranks' facts differ.
    """
    device = _own_device(env)
    timeout = datetime.timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        # All groups inherit the backend. With gloo beside NCCL each would be a mesh of sockets and threads of its own.
        backend = "nccl" if device.type == "cuda" else "gloo"
        if fake:
            # Importing this registers the backend; torch keeps it among its test utilities.
            from torch.testing._internal.distributed.fake_pg import FakeStore

            stand_in()
            dist.init_process_group("fake", store=FakeStore(), rank=env.rank, world_size=env.world_size)
        elif env.launched:
            store = arrive(env, max(timeout, START))
            _compare(store, env, device, facts)
            store.set_timeout(timeout)
            _allow_files()
            dist.init_process_group(backend, store=store, rank=env.rank, world_size=env.world_size, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    elif not fake:
        _compare(dist.distributed_c10d._get_default_store(), env, device, facts)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=plan.tp,
        context_parallel_size=plan.cp,
        pipeline_model_parallel_size=plan.pp,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        create_gloo_process_groups=False,
        # Not init_process_group's, which its groups do not inherit; whole minutes are not required, whatever it says.
        distributed_timeout_minutes=timeout_s / 60,
        order="tp-cp-ep-dp-pp",
    )
    host = dist.group.WORLD
    assert host is not None, "it was initialized above"
    if device.type == "cuda" and not fake:
        host = dist.new_group(backend="gloo", timeout=timeout)
    groups = Groups(
        env=env,
        plan=plan,
        device=device,
        collection=ProcessGroupCollection.use_mpu_process_groups(),
        data=parallel_state.get_data_parallel_group(with_context_parallel=True),
        replicas=parallel_state.get_data_parallel_group(with_context_parallel=False),
        model=parallel_state.get_model_parallel_group(),
        host=host,
        fake=fake,
    )
    check_groups(groups)
    return groups


def check_groups(groups: Groups) -> None:
    """Compare megatron's groups with the plan's reshape: an axis order that changed there would be silently wrong here.

    Raises:
        RuntimeError: a group holds other ranks, or holds them in another order.
    """
    plan, rank = groups.plan, groups.env.rank
    own = plan.coordinates(rank)
    expected = {
        "tp": (groups.collection.tp, {"tp"}),
        "cp": (groups.collection.cp, {"cp"}),
        "pp": (groups.collection.pp, {"pp"}),
        "dp": (groups.replicas, {"dp"}),
        "dp x cp": (groups.data, {"dp", "cp"}),
        "tp x pp": (groups.model, {"tp", "pp"}),
    }
    for name, (group, free) in expected.items():
        ranks = [
            other
            for other in range(plan.world_size)
            if all(
                axis in free or mine == theirs
                for axis, mine, theirs in zip(Coordinates._fields, own, plan.coordinates(other), strict=True)
            )
        ]
        found = dist.get_process_group_ranks(group)
        if found != ranks:
            raise RuntimeError(f"megatron's {name} group of rank {rank} is {found}, not the plan's {ranks}")


def destroy_groups(keep_world: bool = False) -> None:
    """Tear down megatron's groups and torch.distributed; safe to call twice.

    Args:
        keep_world: leave torch.distributed up, so that the same processes can make groups of another grid.
    """
    parallel_state.destroy_model_parallel()
    if not dist.is_initialized():
        return
    if not keep_world:
        dist.destroy_process_group()
        return
    # megatron only forgets its groups. A gloo group that lives on has threads that wake many times a second, and after
    # a few grids in one process they leave the cores no time for work.
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
