"""What runs, and runs slower than it must: advice on a configuration, before anything is spent. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from operator import itemgetter

from parallel.world.grid import GridPlan
from pipeline.config.run import RunConfig
from pipeline.planning.arch import LlamaArch
from pipeline.planning.attention_layout import SHIFT_RULES, AttentionSpec, SequenceLayout, head_plan
from pipeline.planning.context_shards import least_saved, query_key_pairs
from pipeline.reporting.words import counted

EVEN = 1.1
"""Work of the busiest rank over the mean up to which nothing is said."""


Work = tuple[tuple[int, ...], ...]
"""By tensor rank, by context rank."""


def attention_work(arch: LlamaArch, sequence: int, spec: AttentionSpec, tp: int, cp: int) -> Work:
    """(query head, query, key) triples of each tensor rank's context ranks, the last one's padding counted."""
    return _attention_work(arch.heads, arch.kv_heads, sequence, spec, tp, cp)


@cache
def _attention_work(heads: int, kv_heads: int, sequence: int, spec: AttentionSpec, tp: int, cp: int) -> Work:
    tokens = GridPlan(tp, cp, 1, 1).shard_tokens(sequence)
    layout, local = SequenceLayout.dense(1, cp * tokens), heads // tp
    plans = [head_plan(rank * local, local, heads, kv_heads, spec.shifted_heads) for rank in range(tp)]
    known = {plan: query_key_pairs(layout, spec, plan, cp, tokens) for plan in plans}
    return tuple(known[plan] for plan in plans)


def busiest_rank(arch: LlamaArch, sequence: int, spec: AttentionSpec, grid: GridPlan) -> int:
    """The rank whose attention does the most work, for which all others wait; the last of equals.

    Of the first pipeline stage and replica: the others differ in nothing that is counted here.
    """
    work = attention_work(arch, sequence, spec, grid.tp, grid.cp)
    _, tp, cp = max((work[tp][cp], tp, cp) for tp in range(grid.tp) for cp in range(grid.cp))
    return grid.rank(tp, cp, 0, 0)


def imbalance(arch: LlamaArch, sequence: int, group: int, rule: str, tp: int, cp: int) -> float:
    """S² attention of the busiest tensor x context rank over the mean.

    Context rank 0 is left out where there are others: it has no past, so that it does about half of what they do under
    every rule.
    """
    by_rank = attention_work(arch, sequence, AttentionSpec("s2", group, rule), tp, cp)
    work = [pairs for row in by_rank for pairs in row[1 if cp > 1 else 0 :]]
    return max(work) * len(work) / sum(work)


def _ways_out(arch: LlamaArch, sequence: int, group: int, rule: str, tp: int, cp: int) -> Iterator[tuple[float, str]]:
    """What other settings bring the imbalance to, the smallest change first."""
    if rule in ("none", "all"):
        return  # a study's own question
    other = next(name for name in SHIFT_RULES if name != rule)
    yield imbalance(arch, sequence, group, other, tp, cp), f"attention.shifted_heads: {other}"
    for fewer in range(cp - 1, 1, -1):
        if cp % fewer == 0:
            yield imbalance(arch, sequence, group, rule, tp, fewer), f"parallel.cp: {fewer}"
            found = imbalance(arch, sequence, group, other, tp, fewer)
            yield found, f"parallel.cp: {fewer} with attention.shifted_heads: {other}"


def advise(config: RunConfig, arch: LlamaArch, plan: GridPlan) -> tuple[str, ...]:
    """One sentence for each thing that makes ranks wait for each other.

    Args:
        plan: fits the model (`parallel.world.grid.check_model_fits`).
    """
    if plan.cp == 1:
        return ()
    return (*_advise_s2(config, arch, plan), *_advise_full(config, arch, plan))


def _advise_s2(config: RunConfig, arch: LlamaArch, plan: GridPlan) -> Iterator[str]:
    if config.attention.kind != "s2":
        return
    settings = arch, config.sequence, config.group, config.attention.shifted_heads, plan.tp, plan.cp
    now = imbalance(*settings)
    if now <= EVEN:
        return
    sentence = (
        f"attention: with tp {plan.tp} x cp {plan.cp} and groups of {config.group} tokens the busiest rank computes "
        f"{now:.2f} times the average rank's share of S² attention, and the others wait for it"
    )
    ways = list(_ways_out(*settings))
    # The smallest change that evens it out; else the one that comes nearest, if that is worth a change.
    found, setting = next((way for way in ways if way[0] <= EVEN), min(ways, key=itemgetter(0)))
    worth = found <= EVEN or found < 0.9 * now
    yield f"{sentence}; {setting} brings that to {found:.2f}." if worth else f"{sentence}."


def _advise_full(config: RunConfig, arch: LlamaArch, plan: GridPlan) -> Iterator[str]:
    """Only of what was switched off: where too little is saved, waiting is shorter than moving queries."""
    if not (config.attention.kind == "full" or config.attention.full_last_steps):
        return
    now, mended = (
        max(work) * plan.cp / sum(work)
        for without in (config.train.without, ())
        for work in attention_work(
            arch, config.sequence, AttentionSpec("full", 2, lend_from=least_saved(without)), plan.tp, plan.cp
        )[:1]
    )
    if now > EVEN and mended < now:
        yield (
            f"train.without: balanced_attention leaves the last of {plan.cp} context ranks {now:.2f} times the average "
            f"rank's share of full attention, and the others wait for it; remove that word, which brings it to "
            f"{mended:.2f}."
        )


def few_windows(windows: int, batch: int) -> str:
    """The training text is so short that one step repeats it: a sentence."""
    return (
        f"data.path: holds {counted(windows, 'window')} and train.global_batch is {batch}, so one optimizer step reads "
        "the same text more than once; give more text, or lower train.global_batch or data.sequence."
    )
