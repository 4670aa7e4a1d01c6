"""The layouts a run could have on some GPUs, judged by time and memory, best first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from parallel.errors import ConfigError
from pipeline.config.parallel import OffloadConfig
from pipeline.config.run import RunConfig
from pipeline.config.sections import POLICIES
from pipeline.planner.clock import StepTime, step_time
from pipeline.planner.footprint import Footprint, footprint
from pipeline.planner.gpus import Gpu
from pipeline.planning.arch import LlamaArch
from pipeline.planning.base_form import check_base, divides
from pipeline.planning.run_plan import RunPlan

OFFLOADS = tuple(OffloadConfig(params, optimizer) for params in ("none", "cpu") for optimizer in ("none", "cpu"))
MICRO_BATCHES = (1, 2, 4, 8)
ALIKE = 0.005
"""Relative difference of times within which the layout that is safer and simpler is the better one."""
ROOMY = 0.92
"""Of a GPU's memory, up to which a layout is as safe as any."""


@dataclass(frozen=True)
class Site:
    """Where a run is to run."""

    gpu: Gpu
    gpus: int
    host: int
    """Host memory of one machine, bytes."""

    @property
    def a_node(self) -> int:
        """GPUs of one machine that the run has."""
        return min(self.gpus, self.gpu.gpus_a_node)

    @classmethod
    def of(cls, gpu: Gpu, gpus: int, host: int | None = None) -> Site:
        """A site.

        Args:
            host: host memory of one machine, bytes; None: what the GPU's description says for those it has.

        Raises:
            ConfigError: the GPUs do not fill whole machines.
        """
        node = gpu.gpus_a_node
        if gpus < 1:
            raise ConfigError(f"--gpus: {gpus} is no number of GPUs; give 1 or more.")
        if gpus > node and gpus % node:
            low = gpus // node * node
            raise ConfigError(
                f"--gpus: {gpus} {gpu.name} do not fill machines of {node}; give {low} or {low + node}, or a "
                "description with another gpus_a_node."
            )
        return cls(gpu, gpus, gpu.host * min(gpus, node) if host is None else host)


@dataclass(frozen=True)
class Candidate:
    """One layout and what it takes."""

    plan: RunPlan
    site: Site
    memory: Footprint

    @property
    def over_gpu(self) -> int:
        """Bytes of a GPU's memory that are lacking; negative: are left."""
        return self.memory.gpu_total - self.site.gpu.memory

    @property
    def over_host(self) -> int:
        """Bytes of a machine's memory that are lacking; negative: are left."""
        return self.memory.machine - self.site.host

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return self.over_gpu <= 0 and self.over_host <= 0

    def time(self) -> StepTime:
        """Seconds of an optimizer step."""
        return step_time(self.plan, self.site.gpu)


@dataclass(frozen=True)
class Timed:
    """A layout that fits, with its step's time."""

    candidate: Candidate
    time: StepTime

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        plan = self.candidate.plan
        return plan.batch.global_batch * plan.sequence / self.time.total / plan.grid.world_size

    @property
    def layout(self) -> tuple[object, ...]:
        """What makes it another layout than others: engine and axes."""
        grid = self.candidate.plan.grid
        return self.candidate.plan.config.parallel.engine, grid.tp, grid.cp, grid.pp


def _divisors(number: int, limit: int) -> list[int]:
    return [n for n in range(1, min(number, limit) + 1) if number % n == 0]


def _axes(arch: LlamaArch, site: Site, form: str) -> Iterator[tuple[int, int, int]]:
    """(tp, cp, pp) that divide the GPUs, the model and its blocks; tensor parallelism stays within a machine."""
    for tp in _divisors(site.gpus, site.gpu.gpus_a_node):
        if arch.heads % tp or arch.kv_heads % tp or arch.ffn % tp or not divides(form, arch, tp):
            continue
        for cp in _divisors(site.gpus // tp, site.gpus):
            for pp in _divisors(site.gpus // (tp * cp), arch.layers):
                yield tp, cp, pp


def _settings(config: RunConfig, arch: LlamaArch, site: Site) -> Iterator[RunConfig]:
    """Every configuration that differs in layout alone."""
    train, batch = config.train, config.train.global_batch
    for tp, cp, pp in _axes(arch, site, config.model.base):
        if config.attention.legacy_wrap and cp > 1:
            continue  # it wraps around the whole sequence
        replicas = site.gpus // (tp * cp * pp)
        micros = [m for m in MICRO_BATCHES if batch % (m * replicas) == 0]
        engines = [("megatron", OffloadConfig())]
        if pp == 1:
            engines += [("zero3", offload) for offload in OFFLOADS]
        for micro in micros:
            for engine, offload in engines:
                if pp > 1 and batch // (micro * replicas) < pp:
                    continue  # stages that never all work
                axes = {"tp": tp, "cp": cp, "pp": pp, "virtual": 1}
                parallel = replace(config.parallel, auto=False, **axes, engine=engine, offload=offload)
                for word in POLICIES:
                    # Where gate and up lie is for what keeps them; the memory to fill for recompute auto.
                    gate_up = train.gate_up if word == "pointwise" else "gpu"
                    layers = replace(train, micro_batch=micro, recompute=word, gate_up=gate_up, gpu_gib=None)
                    try:
                        settings = replace(config, parallel=parallel, train=layers)
                    except ConfigError:
                        continue  # such as a stream that these ranks do not divide
                    yield settings


def candidates(config: RunConfig, stored: LlamaArch, site: Site) -> list[Candidate]:
    """Every layout the GPUs could have, fitting or not; the mathematics of the run are the same in all.

    Args:
        config: what is to be computed; its layout is not looked at.
        stored: the checkpoint's shape.
    """
    check_base(config.model.base, stored, 1)
    if config.model.base == "fp8" and site.gpu.sold.get("fp8") is None and site.gpu.source:
        raise ConfigError(f"model.base: {site.gpu.name} has no FP8 products; use nf4 or bf16, or a newer GPU.")
    found = []
    for settings in _settings(config, stored, site):
        plan = RunPlan.shaped(settings, stored, site.gpus, site.gpu.memory)
        found.append(Candidate(plan, site, footprint(plan, site.a_node)))
    if not found:
        raise ConfigError(
            f"train.global_batch: {config.train.global_batch} sequences cannot be spread over {site.gpus} GPUs by any "
            "layout; use a multiple of their number."
        )
    return found


def ranked(found: list[Candidate]) -> list[Timed]:
    """Those that fit, the fastest first; of equally fast ones what leaves room, then what offloads less."""
    timed = [Timed(candidate, candidate.time()) for candidate in found if candidate.fits]
    if not timed:
        return []
    fastest = min(one.time.total for one in timed)

    def key(one: Timed) -> tuple[int, bool, int, int]:
        candidate, offload = one.candidate, one.candidate.plan.config.parallel.offload
        tight = candidate.memory.gpu_total > ROOMY * candidate.site.gpu.memory
        away = (offload.params == "cpu") + (offload.optimizer == "cpu")
        return int((one.time.total / fastest - 1) / ALIKE), tight, away, candidate.memory.gpu_total

    return sorted(timed, key=key)


def best_layouts(timed: list[Timed], count: int) -> list[Timed]:
    """The best of each of the first `count` layouts (engine and axes)."""
    first: dict[tuple[object, ...], Timed] = {}
    for one in timed:
        first.setdefault(one.layout, one)
    return list(first.values())[:count]
