"""The planner on the machine at hand: a layout where none is given, a doomed run told, the plan recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from parallel.errors import ConfigError
from parallel.world.rank_env import RankEnv
from pipeline.config.run import RunConfig
from pipeline.planner.auto import RECORD, Device, plan_record, settle
from pipeline.planner.choose import Site
from pipeline.planner.doomed import doomed, out_of_memory
from pipeline.planner.gpus import named_by
from pipeline.planner.host_memory import host_limit
from pipeline.planner.work import useful_operations
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.base_form import capability_of
from pipeline.planning.run_plan import RunPlan, plan_run
from pipeline.reporting.command import say
from pipeline.reporting.lasting import optional_file
from pipeline.storage.json_file import write_json


def this_device(env: RankEnv) -> Device:
    """What this rank computes on."""
    host = host_limit()
    if not torch.cuda.is_available():
        return Device("", host, env.world_size, host, None)
    index = env.local_rank % torch.cuda.device_count()
    facts = torch.cuda.get_device_properties(index)
    capability = capability_of((facts.major, facts.minor))
    return Device(facts.name, facts.total_memory, torch.cuda.device_count(), host, capability)


@dataclass(frozen=True)
class Planned:
    """A run's plan, and where it runs."""

    plan: RunPlan
    stored: LlamaArch
    """The checkpoint's shape."""
    site: Site
    chosen: str
    """What the planner chose and why; empty: the user chose."""

    rate: float | None = None
    """FLOP/s in bf16 that all GPUs together are sold with; None: nothing is known of such GPUs."""

    def ideal(self, step: int) -> float | None:
        """Seconds of optimizer step `step` (from 1) if nothing but what its result needs took time, at that rate.

        Over the seconds it took this is the model FLOP/s utilization (MFU) of PaLM (arXiv 2204.02311, appendix B), with
        what a frozen base needs not computed left out. None: there is no rate.
        """
        if self.rate is None:
            return None
        return useful_operations(self.plan, self.plan.config.in_full(step - 1)) / self.rate

    def record(self, output: Path) -> None:
        """Write RECORD: the layout and what is expected of it. By one rank."""
        path = output / RECORD
        with optional_file(path):
            write_json(path, plan_record(self.plan, self.site, bool(self.chosen)))

    @contextlib.contextmanager
    def explaining_memory(self) -> Iterator[None]:
        """Within, a GPU whose memory runs out tells the plan beside what the allocator had, and what would have fitted.

        Raises:
            torch.OutOfMemoryError: as it came.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            with contextlib.suppress(ConfigError):  # no other layout can be
                say(out_of_memory(self.plan, self.stored, self.site, *peaks))
            raise


def settled(
    config: RunConfig, env: RankEnv, device: Device | None = None, *, resumes: bool = True
) -> tuple[RunConfig, str]:
    """The configuration with a layout, and what was chosen (`planner.auto.settle`).

    Args:
        device: None: this rank's.
        resumes: see `settle`.

    Raises:
        ConfigError, CheckpointError: nothing fits, or there is no checkpoint to plan for.
    """
    if not config.parallel.auto:
        return config, ""
    stored, here = read_arch(Path(config.model.path)), device or this_device(env)
    found = settle(config, stored, here, env.world_size, resumes=resumes)
    return found.config, found.chosen


def plan_here(config: RunConfig, env: RankEnv) -> Planned:
    """The plan of a run on these ranks' devices, before anything is loaded.

    Raises:
        ConfigError: also where a GPU cannot hold what the layout takes.
    """
    device = this_device(env)
    config, chosen = settled(config, env, device)
    plan = plan_run(config, env.world_size)
    stored, site = read_arch(Path(config.model.path)), device.site(env.world_size)
    problem = doomed(plan, stored, site) if device.name else ""
    if problem:
        raise ConfigError(problem)
    known = named_by(device.name) if device.name else None
    sold = None if known is None else known.sold["bf16"]
    return Planned(plan, stored, site, chosen, None if sold is None else sold * env.world_size)
