"""`parallel: auto`: the planner's choice at a run's start, and the record that a resume follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError, ConfigError
from pipeline.config.parallel import OffloadConfig, ParallelConfig
from pipeline.config.run import RunConfig
from pipeline.planner.choose import Site, choices, ranked
from pipeline.planner.clock import step_time
from pipeline.planner.explain import named, refusal, why
from pipeline.planner.footprint import footprint
from pipeline.planner.gpus import Gpu, find_gpu, named_by
from pipeline.planning.arch import LlamaArch
from pipeline.planning.memory import GIB
from pipeline.planning.run_plan import RunPlan
from pipeline.storage.json_file import read_object

RECORD = "plan.json"
"""In a run's output: what was planned."""
STANDARD = "h100-80gb"
"""Whose rates stand in for those of a GPU without a description: layouts compare much alike on all."""
CPU_RATES = {"bf16": 1e11, "fp8": 1e11, "hbm": 2e10, "pcie": 1e10, "nvlink": None, "network": 1e9}
"""Of a few cores, roughly: a layout on CPUs is for trying things out."""


@dataclass(frozen=True)
class Device:
    """What one rank computes on, as the process finds it."""

    name: str
    """As PyTorch calls it; empty: a CPU."""
    memory: int
    """Bytes of a GPU; of a CPU, of the machine."""
    here: int
    """Ranks of this machine."""
    host: int
    """Bytes of the machine's memory."""
    capability: float | None
    """CUDA's compute capability; None: a CPU."""

    def site(self, world: int) -> Site:
        """Where `world` such ranks run."""
        here = min(self.here, world)
        if not self.name:
            rates = dict(CPU_RATES)
            gpu = Gpu("cpu", self.memory // world, rates, {}, world, self.host // world, "")
            return Site(gpu, world, self.host)
        known = named_by(self.name)
        gpu = known or replace(find_gpu(STANDARD), name=self.name)
        own = replace(gpu, memory=self.memory, gpus_a_node=here, capability=self.capability)
        return Site(own, world, self.host)


@dataclass(frozen=True)
class Settled:
    """A configuration whose layout is known."""

    config: RunConfig
    chosen: str = ""
    """What was chosen and why, a sentence; empty: the user chose."""
    auto: bool = False


def _with(config: RunConfig, layout: Mapping[str, Any], planned: int) -> RunConfig:
    """The configuration with a recorded layout, for which so many bytes of a GPU were planned.

    KeyError, TypeError: it is none.
    """
    parallel = dict(layout["parallel"])
    parallel["offload"] = OffloadConfig(**parallel["offload"])
    parallel["timeout_s"] = config.parallel.timeout_s
    asked = config.train
    # A stream that the user asks for, also since the run began, counts; records of earlier releases know of no other.
    # One that the planner chose goes before the word auto, which looks at the whole GPU.
    own = layout.get("stream")
    stream = own if own is not None and asked.stream in (None, "auto") else asked.stream
    recompute = layout["recompute"]
    if asked.gpu_gib is not None and recompute != "auto" and planned > asked.gpu_gib * GIB:
        raise KeyError("gpu_gib")  # asked for since: what was chosen takes more
    train = replace(
        asked,
        micro_batch=layout["micro_batch"],
        recompute=recompute,
        gate_up=layout.get("gate_up", asked.gate_up),
        gpu_gib=asked.gpu_gib if recompute == "auto" else None,
        stream=stream,
    )
    return replace(config, parallel=ParallelConfig(**parallel), train=train)


def settle(config: RunConfig, stored: LlamaArch, device: Device, world: int, *, resumes: bool = True) -> Settled:
    """The configuration with a layout: the user's, the one this run began with, or the planner's.

    It follows from the arguments and from what an earlier start recorded. Ranks of unlike machines may come to
    different ones: they compare their settings before anything is loaded (`world.agreement`).

    Args:
        world: ranks.
        resumes: a run is to go on, for which the record must be of as many ranks; False: any layout it had will do.

    Raises:
        ConfigError: nothing fits; by how much, and what would.
    """
    if not config.parallel.auto:
        return Settled(config)
    path = Path(config.output) / RECORD
    before = ""
    if path.is_file():
        try:
            record = read_object(path)
            if record["auto"] and (record["ranks"] == world or not resumes):
                same = _with(config, record["layout"], sum(record["memory"].values()))
                RunPlan.shaped(same, stored, record["ranks"])
                return Settled(same, f"parallel: auto keeps what this run began with: {record['name']}.", True)
            before = f" (before, on {record['ranks']} ranks: {record['name']})" if record["auto"] else ""
        except (CheckpointError, KeyError, TypeError, ConfigError):
            before = f" ({path} tells no layout that could be kept)"
    site = device.site(world)
    found = choices(config, stored, site)
    timed = ranked(found)
    if not timed:
        raise refusal(found, config, stored, site)
    best = timed[0]
    return Settled(
        best.candidate.plan.config,
        f"parallel: auto chose {named(best.candidate.plan)}: {why(best, best)}; about {best.time.total:.3g} s a step "
        f"and {best.candidate.memory.gpu_total / GIB:.1f} of {site.gpu.memory / GIB:.1f} GiB a GPU{before}.",
        True,
    )


def plan_record(plan: RunPlan, site: Site, auto: bool) -> dict[str, Any]:
    """What RECORD holds: the layout, and what is expected of it."""
    memory, time = footprint(plan, site.a_node), step_time(plan, site.gpu)
    config = plan.config
    layout = {
        "parallel": asdict(config.parallel),
        "micro_batch": config.train.micro_batch,
        "recompute": config.train.recompute,
        "gate_up": config.train.gate_up,
        "stream": config.train.stream,
    }
    return {
        "auto": auto,
        "gpu": site.gpu.name,
        "ranks": site.gpus,
        "name": named(plan),
        "layout": layout,
        "memory": memory.gpu,
        "allocated": memory.allocated,
        "host": memory.resident,
        "seconds": time.parts,
        "hidden": time.hidden,
    }
