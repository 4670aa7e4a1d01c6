"""The layouts a run could have on some GPUs, judged by time and memory, best first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from parallel.errors import ConfigError
from pipeline.config.parallel import OffloadConfig
from pipeline.config.run import RunConfig
from pipeline.config.sections import POLICIES
from pipeline.planner.clock import StepTime, step_time
from pipeline.planner.footprint import Footprint, footprint
from pipeline.planner.gpus import Gpu
from pipeline.planning.arch import LlamaArch
from pipeline.planning.base_form import check_base, check_fp8, divides
from pipeline.planning.memory import GIB
from pipeline.planning.run_plan import RunPlan

OFFLOADS = tuple(OffloadConfig(params, optimizer) for params in ("none", "cpu") for optimizer in ("none", "cpu"))
MICRO_BATCHES = (1, 2, 4, 8)
MOST_GPUS = 1 << 16
"""That are planned for: the time to plan grows with them."""
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
        if not 1 <= gpus <= MOST_GPUS:
            raise ConfigError(f"--gpus: {gpus} is no number of GPUs to plan for; give 1 to {MOST_GPUS}.")
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

    @classmethod
    def of(cls, plan: RunPlan, site: Site) -> Candidate:
        """A layout with its memory."""
        return cls(plan, site, footprint(plan, site.a_node))

    @property
    def cut(self) -> Cut:
        """Of its plan."""
        grid = self.plan.grid
        return Cut(grid.tp, grid.cp, grid.pp, self.plan.config.train.micro_batch)

    @cached_property
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
        """What makes it another layout than others."""
        return layout_of(self.candidate.plan)


def layout_of(plan: RunPlan) -> tuple[object, ...]:
    """Engine and axes."""
    return plan.config.parallel.engine, plan.grid.tp, plan.grid.cp, plan.grid.pp


def _divisors(number: int, limit: int) -> list[int]:
    return [n for n in range(1, min(number, limit) + 1) if number % n == 0]


@dataclass(frozen=True)
class Cut:
    """How layers, tensors and sequences are cut, and how many sequences are at work at once."""

    tp: int
    cp: int
    pp: int
    micro_batch: int

    def replicas(self, gpus: int) -> int:
        """Data-parallel ranks on so many GPUs."""
        return gpus // (self.tp * self.cp * self.pp)


def _axes(arch: LlamaArch, site: Site, form: str) -> Iterator[tuple[int, int, int]]:
    """(tp, cp, pp) that divide the GPUs, the model and its blocks; tensor parallelism stays within a machine."""
    for tp in _divisors(site.gpus, site.gpu.gpus_a_node):
        if arch.heads % tp or arch.kv_heads % tp or arch.ffn % tp or not divides(form, arch, tp):
            continue
        for cp in _divisors(site.gpus // tp, site.gpus):
            for pp in _divisors(site.gpus // (tp * cp), arch.layers):
                yield tp, cp, pp


class Layouts:
    """The layouts that a run may have on some GPUs."""

    def __init__(self, config: RunConfig, stored: LlamaArch, site: Site, policies: Sequence[str] = POLICIES) -> None:
        """See `candidates`.

        Args:
            policies: words of train.recompute to try.

        Raises:
            ConfigError: the GPUs or the model lack what model.base or model.fp8_recipe needs.
        """
        check_base(config.model.base, stored, 1)
        check_fp8(config.model.base, config.model.fp8_recipe, site.gpu.capability, site.gpu.name)
        said = "base: fp8" if config.model.base == "fp8" else f"fp8_recipe: {config.model.fp8_recipe}"
        if said != "fp8_recipe: none" and not site.gpu.rate("fp8"):
            raise ConfigError(
                f"model.{said} cannot be planned for {site.gpu.name}, whose description gives products in 8 bits no "
                "rate; write one beside bf16's (sold: fp8), or have longspan bench calibrate measure it there."
            )
        self.config, self.arch, self.site = config, stored, site
        self.refused: ConfigError | None = None
        """Why the first that cannot be cannot, such as cp beside a sliding window."""
        train = config.train
        self._trains = {
            (micro, word): replace(
                train,
                micro_batch=micro,
                recompute=word,
                # Where gate and up lie is for what keeps them; the memory to fill for recompute auto.
                gate_up=train.gate_up if word == "pointwise" else "gpu",
                gpu_gib=None,
            )
            for micro in MICRO_BATCHES
            for word in policies
        }
        self.words = tuple(policies)

    def cuts(self) -> Iterator[Cut]:
        """Every cut under which the batch can be spread over the GPUs."""
        batch, gpus, attention = self.config.train.global_batch, self.site.gpus, self.config.attention
        for tp, cp, pp in _axes(self.arch, self.site, self.config.model.base):
            if (attention.legacy_wrap or attention.for_studies) and cp > 1:
                continue  # computed on whole sequences alone
            for micro in MICRO_BATCHES:
                cut = Cut(tp, cp, pp, micro)
                together = micro * cut.replicas(gpus)
                if batch % together or (pp > 1 and batch // together < pp):
                    continue  # of the latter, stages never all work
                yield cut

    def engines(self, cut: Cut) -> tuple[str, ...]:
        """Those that run a cut: zero3 has no stages, and shards no matrices but those of our own linears."""
        return ("megatron", "zero3") if cut.pp == 1 and self.config.model.family != "te" else ("megatron",)

    def of(self, cut: Cut, engine: str, words: Sequence[str] = ()) -> Iterator[Candidate]:
        """Those of a cut that can be.

        Args:
            words: of train.recompute; none: all.
        """
        for offload in OFFLOADS if engine == "zero3" else (OffloadConfig(),):
            axes = {"tp": cut.tp, "cp": cut.cp, "pp": cut.pp, "virtual": 1}
            parallel = replace(self.config.parallel, auto=False, **axes, engine=engine, offload=offload)
            for word in words or self.words:
                train = self._trains[cut.micro_batch, word]
                try:
                    settings = replace(self.config, parallel=parallel, train=train)
                except ConfigError:
                    continue  # such as a stream that these ranks do not divide
                try:
                    plan = RunPlan.shaped(settings, self.arch, self.site.gpus, self.site.gpu.memory)
                except ConfigError as error:
                    self.refused = self.refused or error
                    continue
                yield Candidate.of(plan, self.site)

    def __iter__(self) -> Iterator[Candidate]:
        """All of them.

        Raises:
            ConfigError: none can be.
        """
        found = False
        for cut in self.cuts():
            for engine in self.engines(cut):
                for one in self.of(cut, engine):
                    found = True
                    yield one
        if self.refused is not None and not found:
            raise self.refused


def candidates(config: RunConfig, stored: LlamaArch, site: Site) -> list[Candidate]:
    """Every layout the GPUs could have with one recompute policy in all layers, fitting or not.

    The mathematics of the run are the same in all.

    Args:
        config: what is to be computed; its layout is not looked at.
        stored: the checkpoint's shape.

    Raises:
        ConfigError: the batch cannot be spread over the GPUs, or they lack what model.base needs.
    """
    found = list(Layouts(config, stored, site))
    if not found:
        raise ConfigError(
            f"train.global_batch: {config.train.global_batch} sequences cannot be spread over {site.gpus} GPUs by any "
            "layout; use a multiple of their number."
        )
    return found


def _places(config: RunConfig, site: Site) -> tuple[str, ...]:
    """Where gate and up may lie (train.gate_up).

    Nothing is rounded in host memory, so that it is tried beside the GPU's own where a machine has one GPU. That a
    machine's memory keeps up with several was not measured: there it has to be asked for. A CPU has no other memory.
    """
    asked = config.train.gate_up
    if asked == "fp8" or site.a_node > 1 or "kernels" in config.train.without or site.gpu.name == "cpu":
        return (asked,)
    return "gpu", "host"


def _everywhere(config: RunConfig, stored: LlamaArch, site: Site) -> list[Candidate]:
    """`candidates`, and those with gate and up in the other places they may lie."""
    found = candidates(config, stored, site)
    for place in set(_places(config, site)) - {config.train.gate_up}:
        train = replace(config.train, recompute="pointwise", gate_up=place, gpu_gib=None)
        found += Layouts(replace(config, train=train), stored, site, ("pointwise",))
    return found


def _mixed(found: list[Candidate], config: RunConfig, stored: LlamaArch, site: Site) -> list[Candidate]:
    """Layouts whose layers have different policies, where one policy for all leaves memory unused.

    Only of layouts that could become the fastest of their kind: what computes nothing again is their bound.
    """
    by_layout: dict[object, list[Candidate]] = {}
    for one in found:
        train = one.plan.config.train
        by_layout.setdefault((one.plan.config.parallel, train.micro_batch, train.stream), []).append(one)
    open_: list[tuple[float, float, list[Candidate]]] = []
    fastest: dict[object, float] = {}
    for alike in by_layout.values():
        times = [(one.time.total, one.fits) for one in alike]
        fits = [seconds for seconds, fit in times if fit]
        if fits:
            kind = layout_of(alike[0].plan)
            fastest[kind] = min(fastest.get(kind, float("inf")), *fits)
            # A stream's chunks may be larger where less lies on the GPU: then nothing known bounds it.
            bound = 0.0 if alike[0].plan.config.train.stream == "auto" else min(times)[0]
            open_.append((bound, min(fits), alike))
    mixed: list[Candidate] = []
    for bound, alone, alike in sorted(open_, key=lambda each: each[:2]):
        kind = layout_of(alike[0].plan)
        settings = alike[0].plan.config
        for place in _places(config, site):
            if bound >= (1 - ALIKE) * fastest[kind] or bound == alone:
                break
            train = replace(settings.train, recompute="auto", gate_up=place, gpu_gib=config.train.gpu_gib)
            plan = RunPlan.shaped(replace(settings, train=train), stored, site.gpus, site.gpu.memory)
            one = Candidate.of(plan, site)
            if one.fits and (seconds := one.time.total) < alone:
                mixed.append(one)
                fastest[kind] = min(fastest[kind], seconds)
    return mixed


def within(config: RunConfig, site: Site) -> Site:
    """The site with what train.gpu_gib leaves of its GPUs."""
    asked = config.train.gpu_gib
    if asked is None:
        return site
    return replace(site, gpu=replace(site.gpu, memory=min(site.gpu.memory, round(asked * GIB))))


def streamed(config: RunConfig) -> RunConfig | None:
    """The same run with its sequences streamed; None: it cannot be, as with a group that grows with the sequence."""
    if config.train.stream is not None:
        return None
    try:
        return replace(config, train=replace(config.train, stream="auto"))
    except ConfigError:
        return None


def choices(config: RunConfig, stored: LlamaArch, site: Site) -> list[Candidate]:
    """All to choose from: `candidates`, mixes of policies, and where nothing else fits a streamed sequence.

    Streaming computes the same as well, but runs chunks forward twice; it is possible where the group is fixed.

    Raises:
        ConfigError: the batch cannot be spread over the GPUs, or they lack what model.base needs.
    """
    site = within(config, site)
    found = _everywhere(config, stored, site)
    in_chunks = None if any(one.fits for one in found) else streamed(config)
    if in_chunks is not None:
        try:
            found += _everywhere(in_chunks, stored, site)
        except ConfigError:
            return found  # such as a sliding window
    found += _mixed(found, config, stored, site)
    return found if config.train.gpu_gib is None else [_held(one) for one in found]


def _held(one: Candidate) -> Candidate:
    """With its chunks in numbers, where no train.gpu_gib keeps a run from taking all of a GPU for longer ones."""
    plan = one.plan
    if plan.config.train.stream != "auto" or plan.config.train.gpu_gib is not None or plan.stream is None:
        return one
    train = replace(plan.config.train, stream=plan.stream)
    return replace(one, plan=replace(plan, config=replace(plan.config, train=train)))


def ranked(found: list[Candidate]) -> list[Timed]:
    """Those that fit, the fastest first; of equally fast ones what leaves room, then what offloads less."""
    timed = [Timed(candidate, candidate.time) for candidate in found if candidate.fits]
    if not timed:
        return []
    fastest = min(one.time.total for one in timed)

    def key(one: Timed) -> tuple[int, bool, int, int]:
        candidate, offload = one.candidate, one.candidate.plan.config.parallel.offload
        tight = candidate.memory.gpu_total > ROOMY * candidate.site.gpu.memory
        parked = candidate.plan.config.train.gate_up == "host"
        away = (offload.params == "cpu") + (offload.optimizer == "cpu") + parked
        return int((one.time.total / fastest - 1) / ALIKE), tight, away, candidate.memory.gpu_total

    return sorted(timed, key=key)


def best_layouts(timed: list[Timed], count: int) -> list[Timed]:
    """The best of each of the first `count` layouts (engine and axes)."""
    first: dict[tuple[object, ...], Timed] = {}
    for one in timed:
        first.setdefault(one.layout, one)
    return list(first.values())[:count]
