"""Why a layout is the better one, in words and figures; and the sentences where none fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import NamedTuple

from parallel.errors import ConfigError
from pipeline.config.run import RunConfig
from pipeline.planner.choose import MOST_GPUS, Candidate, Layouts, Site, Timed, streamed, within
from pipeline.planner.gpus import read_gpus
from pipeline.planning.arch import LlamaArch
from pipeline.planning.balance import imbalance
from pipeline.planning.memory import GIB
from pipeline.planning.run_plan import RunPlan

UNIT = 1024
"""Tokens that a shorter sequence is a multiple of."""
STREAMED_GROUP = 8192
"""Tokens of a group that is suggested for streaming, as in launch/configs/llama3_8b_1m.yaml."""
AMPLE = 1 << 50
"""Bytes of host memory that no run takes."""
MOST_TIMES = 64
"""Times as many GPUs that are tried where none fits."""


def named(plan: RunPlan) -> str:
    """A layout in one line."""
    grid, config = plan.grid, plan.config
    axes = [f"{name}{size}" for name, size in (("TP", grid.tp), ("CP", grid.cp), ("PP", grid.pp), ("DP", grid.dp))]
    shown = " x ".join(axis for axis, size in zip(axes, (grid.tp, grid.cp, grid.pp, grid.dp), strict=True) if size > 1)
    offload = config.parallel.offload
    away = [what for what, where in (("weights", offload.params), ("optimizer", offload.optimizer)) if where == "cpu"]
    parts = [config.parallel.engine, shown or "one GPU"]
    if config.model.base != "bf16":
        parts.append(f"base {config.model.base}")
    if away:
        parts.append(f"{' and '.join(away)} in host memory")
    parts.append(f"recompute {_recompute(plan)}")
    if plan.stream is not None and plan.stream < plan.sequence:
        parts.append(f"streamed in chunks of {plan.stream} tokens")
    if config.train.micro_batch > 1:
        parts.append(f"micro-batch {config.train.micro_batch}")
    return ", ".join(parts)


def _recompute(plan: RunPlan) -> str:
    """The layers' policies in a word, or how many layers have each."""
    held = Counter(policy.value for policy in plan.recompute)
    words = next(iter(held)) if len(held) == 1 else ", ".join(f"{policy} of {n} layers" for policy, n in held.items())
    return words.replace("host", "pointwise with gate and up in host memory")


def why(one: Timed, best: Timed) -> str:
    """What makes `one` the best, or slower than it."""
    parts, total = one.time.parts, one.time.total
    if one is best:
        first = sorted(parts, key=lambda part: -parts[part])[:2]
        most = " and ".join(f"{part} {parts[part] / total:.0%}" for part in first)
        return f"fastest that fits: {most} of the step{_uneven(one.candidate.plan)}"
    changes = {part: parts.get(part, 0.0) - best.time.parts.get(part, 0.0) for part in {*parts, *best.time.parts}}
    worse = [part for part in sorted(changes, key=lambda part: -changes[part]) if changes[part] > 0.002 * total][:2]
    better = [part for part in sorted(changes, key=lambda part: changes[part]) if changes[part] < -0.002 * total][:1]
    memory = (one.candidate.memory.gpu_total - best.candidate.memory.gpu_total) / GIB
    differences = [f"{part} {changes[part]:+.3g} s" for part in (*worse, *better)] or ["as fast"]
    if abs(memory) > 0.5:
        differences.append(f"{abs(memory):.1f} GiB {'more' if memory > 0 else 'less'} a GPU")
    return "; ".join(differences)


def _uneven(plan: RunPlan) -> str:
    """What the busiest rank's attention is over the mean's, where that is worth a word."""
    grid = plan.grid
    if plan.attention.kind != "s2" or grid.cp == 1:
        return ""
    ratio = imbalance(plan.arch, plan.sequence, plan.group, plan.attention.shifted_heads, grid.tp, grid.cp)
    return f"; the busiest rank attends {ratio:.2f} times the mean" if ratio > 1.01 else ""


@dataclass(frozen=True)
class Way:
    """A change that makes a run fit."""

    change: str
    """In the words of a YAML."""
    candidate: Candidate
    settings: tuple[str, ...] = ()
    """What it sets, a.b=c."""
    flags: str = ""
    """What `longspan plan` is to be told of other GPUs or machines."""


def nearest(found: list[Candidate]) -> Candidate:
    """Of layouts that do not fit, the one that lacks least."""
    return min(found, key=lambda one: (max(one.over_gpu, 0) + max(one.over_host, 0), one.over_gpu))


def _fitting(config: RunConfig, stored: LlamaArch, site: Site) -> Candidate | None:
    """A layout that fits, if any does: the policy that keeps least tells."""
    return next(_all_fitting(config, stored, site), None)


def _all_fitting(config: RunConfig, stored: LlamaArch, site: Site) -> Iterator[Candidate]:
    try:
        yield from (one for one in Layouts(config, stored, within(config, site), ("full",)) if one.fits)
    except ConfigError:
        return


def _fewer_tokens(config: RunConfig, stored: LlamaArch, site: Site) -> Way | None:
    """The longest sequence that fits, by halving the range."""
    low, high, best = 0, config.sequence // UNIT, None
    while high - low > 1:
        middle = (low + high) // 2
        shorter = _shorter(config, middle * UNIT)
        one = None if shorter is None else _fitting(shorter, stored, site)
        low, high = (middle, high) if one else (low, middle)
        if shorter is not None and one:
            settings = [f"data.sequence={shorter.sequence}"]
            if shorter.attention != config.attention:
                settings.append("attention.group_size=null")
            best = Way(f"data.sequence: {shorter.sequence} tokens", one, tuple(settings))
    return best


def _shorter(config: RunConfig, tokens: int) -> RunConfig | None:
    """The same run on shorter sequences; None: it cannot be, as where a study's groups no longer divide them."""
    attention = config.attention
    if attention.group_size is not None and attention.group_size > tokens:
        attention = replace(attention, group_size=None)
    try:
        return replace(config, data=replace(config.data, sequence=tokens), attention=attention)
    except ConfigError:
        return None


class Change(NamedTuple):
    """What the user may choose to make a run fit."""

    words: str
    settings: tuple[str, ...]
    """What it sets, a.b=c."""
    config: RunConfig
    """The run that has it."""


def _smaller_base(config: RunConfig) -> Change | None:
    """A base in 4 bits, which rounds it: nobody but the user chooses that."""
    if config.model.base != "bf16" or config.model.family != "local":
        return None
    return Change("model.base: nf4", ("model.base=nf4",), replace(config, model=replace(config.model, base="nf4")))


def _streamed(config: RunConfig) -> Change | None:
    """A group that does not grow with the sequence, so that it can be streamed: the user's choice."""
    if config.train.stream is not None or config.attention.kind != "s2" or config.attention.group_size is not None:
        return None
    group = min(STREAMED_GROUP, config.sequence)
    fixed = replace(config.attention, group_size=group, full_last_steps=0)
    change = f"attention.group_size: {group} and train.stream: auto"
    settings = [f"attention.group_size={group}", "train.stream=auto"]
    if config.attention.full_last_steps:
        change += " (and attention.full_last_steps: 0)"
        settings.append("attention.full_last_steps=0")
    try:
        chunked = replace(config, attention=fixed, train=replace(config.train, stream="auto"))
    except ConfigError:  # what does not go with a stream, such as legacy_wrap
        return None
    return Change(change, tuple(settings), chunked)


def ways_out(config: RunConfig, stored: LlamaArch, site: Site) -> list[Way]:
    """What would make a run fit that does not: one change, or where none is enough several together."""
    return list(_changes(config, stored, site)) or list(_together(config, stored, site))


def _together(config: RunConfig, stored: LlamaArch, site: Site) -> Iterator[Way]:
    """Fewer tokens on the same GPUs, with host memory as it takes; or else with a smaller base as well."""
    smaller = _smaller_base(config)
    for change in (Change("", (), config), *([smaller] if smaller else [])):
        shorter = _fewer_tokens(change.config, stored, replace(site, host=AMPLE))
        if shorter is None:
            continue
        # As many tokens may fit several layouts: the one that takes least of the host.
        roomy = _roomy(shorter.candidate.plan.config, stored, site)
        words, flags = [*filter(None, [change.words]), shorter.change], ""
        if roomy is not None and roomy.over_host > 0:
            room = -(-roomy.memory.machine // GIB)
            words.append(f"{room} GiB of host memory a machine")
            flags = f"--host-memory {room}"
        yield Way(" with ".join(words), shorter.candidate, change.settings + shorter.settings, flags)
        return


def _roomy(config: RunConfig, stored: LlamaArch, site: Site) -> Candidate | None:
    """Of layouts that fit the GPUs the one that takes least of a machine's memory, with how much that is over."""
    rooms = list(_all_fitting(config, stored, replace(site, host=AMPLE)))
    least = min(rooms, key=lambda one: one.memory.machine, default=None)
    return None if least is None else replace(least, site=site)


def _changes(config: RunConfig, stored: LlamaArch, site: Site) -> Iterator[Way]:
    """Fewer tokens, a smaller base, a stream, more, other or roomier GPUs, more host memory: each alone."""
    shorter = _fewer_tokens(config, stored, site)
    if shorter:
        yield shorter
    smaller, grouped = _smaller_base(config), _streamed(config)
    both = None if smaller is None or grouped is None else _smaller_base(grouped.config)
    either = False
    for way in (smaller, grouped):
        one = None if way is None else _fitting(way.config, stored, site)
        if way is not None and one is not None:
            either = True
            yield Way(way.words, one, way.settings)
    if both is not None and grouped is not None and not either and (one := _fitting(both.config, stored, site)):
        yield Way(f"{grouped.words} with {both.words}", one, grouped.settings + both.settings)
    gpus, node = site.gpus, site.gpu.gpus_a_node
    while gpus < min(MOST_TIMES * site.gpus, MOST_GPUS):
        gpus *= 2
        if gpus > node and gpus % node:
            continue  # no whole machines
        one = _fitting(config, stored, replace(site, gpus=gpus))
        if one:
            yield Way(f"{gpus} GPUs", one, flags=f"--gpus {gpus}")
            break
    larger = sorted((gpu for gpu in read_gpus().values() if gpu.memory > site.gpu.memory), key=lambda gpu: gpu.memory)
    for gpu in larger:
        one = _fitting(config, stored, replace(site, gpu=gpu))
        if one:
            yield Way(f"as many {gpu.name}", one, flags=f"--gpu {gpu.name}")
            break
    ample = replace(site, host=AMPLE)
    # A stream keeps most in host memory.
    wanted = [config, streamed(config)]
    rooms = [one for each in wanted if each is not None for one in _all_fitting(each, stored, ample)]
    roomy = min(rooms, key=lambda one: one.memory.machine, default=None)
    if roomy:
        room = -(-roomy.memory.machine // GIB)
        yield Way(f"{room} GiB of host memory a machine", roomy, flags=f"--host-memory {room}")


def refusal(
    found: list[Candidate],
    config: RunConfig,
    stored: LlamaArch,
    site: Site,
    said: Callable[[Way], str] = attrgetter("change"),
) -> ConfigError:
    """By how much nothing fits, and what would make it fit.

    Args:
        said: how a way out is to be told.
    """
    least, whole, site = nearest(found), site, within(config, site)
    lacks = []
    if least.over_gpu > 0:
        part = max(least.memory.gpu, key=lambda kind: least.memory.gpu[kind])
        lacks.append(
            f"a GPU lacks {least.over_gpu / GIB:.1f} GiB ({least.memory.gpu_total / GIB:.1f} needed, most of it "
            f"{part}, of {site.gpu.memory / GIB:.1f})"
        )
    if least.over_host > 0:
        lacks.append(
            f"a machine lacks {least.over_host / GIB:.0f} GiB of host memory ({least.memory.machine / GIB:.0f} needed "
            f"of {site.host / GIB:.0f})"
        )
    ways = [said(way) for way in ways_out(config, stored, site)]
    if site != whole and least.memory.gpu_total <= whole.gpu.memory:
        ways.insert(0, "a larger train.gpu_gib")
    mend = (
        f"it would fit with {', or '.join(ways)}"
        if ways
        else "no shorter sequence, smaller base, host memory or number of such GPUs that is looked at is enough"
    )
    return ConfigError(
        f"No layout fits: with {named(least.plan)} on {site.gpus} x {site.gpu.name} {' and '.join(lacks)}; {mend}."
    )
