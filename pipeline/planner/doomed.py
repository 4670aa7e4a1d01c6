"""A run that will not fit, or did not: what it takes by kind, and the setting that would have fitted."""

from __future__ import annotations

from dataclasses import replace

from pipeline.config.parallel import OffloadConfig
from pipeline.config.run import RunConfig
from pipeline.planner.choose import Candidate, Site, Timed, choices, ranked
from pipeline.planner.explain import named
from pipeline.planner.footprint import footprint
from pipeline.planning.arch import LlamaArch
from pipeline.planning.memory import GIB
from pipeline.planning.run_plan import RunPlan

CERTAIN = 0.95
"""Of what is planned, what a run certainly takes: the formula's worst miss (tools/bench/points.yaml) and more."""


def doomed(plan: RunPlan, stored: LlamaArch, site: Site) -> str:
    """Why a run will end out of memory, one sentence with what would fit; empty: it need not.

    What PyTorch allocates alone must be more than a GPU has: a run that may just fit is let go.
    """
    candidate = Candidate.of(plan, site)
    over = int(candidate.memory.allocated * CERTAIN) - site.gpu.memory
    if over <= 0:
        return ""
    largest = max(candidate.memory.gpu, key=lambda kind: candidate.memory.gpu[kind])
    sentence = (
        f"parallel: {named(plan)} takes about {candidate.memory.gpu_total / GIB:.1f} GiB a GPU (most of it {largest}, "
        f"{candidate.memory.gpu[largest] / GIB:.1f}) and {site.gpu.name} has {site.gpu.memory / GIB:.1f}"
    )
    better = instead(plan, stored, site)
    if better is None:
        return f"{sentence}; no layout of these GPUs fits: use more of them, or lower data.sequence."
    setting = setting_of(better, plan.config)
    return f"{sentence}; {named(better.candidate.plan)} would fit ({setting}), or set parallel: auto."


def instead(
    plan: RunPlan, stored: LlamaArch, site: Site, most: int | None = None, *, capped: bool = False
) -> Timed | None:
    """The fastest layout that fits; None: there is none.

    Args:
        most: bytes that it may take of a GPU; None: what the GPU has.
        capped: it keeps to train.gpu_gib.
    """
    # What the user would leave unused of a GPU is at hand where memory lacks.
    free = plan.config if capped else replace(plan.config, train=replace(plan.config.train, gpu_gib=None))
    found = choices(free, stored, site)
    if most is not None:
        found = [one for one in found if one.memory.gpu_total <= most]
    return next(iter(ranked(found)), None)


def setting_of(one: Timed, asked: RunConfig) -> str:
    """A layout as the settings of a YAML, which has those of `asked` otherwise."""
    config = one.candidate.plan.config
    parallel = config.parallel
    parts = [f"engine: {parallel.engine}", f"tp: {parallel.tp}", f"cp: {parallel.cp}", f"pp: {parallel.pp}"]
    if parallel.offload != OffloadConfig():
        parts.append(f"offload: {{params: {parallel.offload.params}, optimizer: {parallel.offload.optimizer}}}")
    train = config.train
    rest = f"train.micro_batch: {train.micro_batch}, train.recompute: {train.recompute}"
    if train.stream is not None:
        rest += f", train.stream: {train.stream}"
    if train.gate_up != asked.train.gate_up:
        rest += f", train.gate_up: {train.gate_up}"
    if train.gpu_gib != asked.train.gpu_gib:
        rest += f", train.gpu_gib: {'null' if train.gpu_gib is None else train.gpu_gib}"
    return f"parallel: {{{', '.join(parts)}}}, {rest}"


def out_of_memory(plan: RunPlan, stored: LlamaArch, site: Site, allocated: int, reserved: int) -> str:
    """What to say where the GPU's memory ran out: the plan beside the allocator, and what would have fitted.

    Args:
        allocated, reserved: PyTorch's peaks, bytes.
    """
    memory = footprint(plan, site.a_node)
    parts = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in memory.gpu.items() if size >= GIB // 20)
    sentence = (
        f"out of GPU memory: planned {memory.gpu_total / GIB:.1f} GiB ({parts}); PyTorch had allocated "
        f"{allocated / GIB:.1f} and reserved {reserved / GIB:.1f} of {site.gpu.memory / GIB:.1f}"
    )
    # What was planned was too little: only a layout that takes a good deal less is worth a try.
    better = instead(plan, stored, site, int(0.9 * min(memory.gpu_total, site.gpu.memory)))
    if better is None:
        return f"{sentence}; no layout of these GPUs takes much less: use more of them, or lower data.sequence."
    size = better.candidate.memory.gpu_total / GIB
    return f"{sentence}; {setting_of(better, plan.config)} takes {size:.1f} and would have fitted."
