"""The best layout of every kind, found without looking at all of them: for tables of many numbers of GPUs.

What is skipped cannot be the best. No layout takes less time than its layers do with all weights at hand, and the loss;
none takes less of a GPU than it does with all offloaded that can be. The result is that of
`ranked(candidates(...))`: tests/unit/planner/test_search.py compares them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from operator import itemgetter

from parallel.world.grid import GridPlan
from pipeline.config.parallel import OffloadConfig, ParallelConfig
from pipeline.config.run import RunConfig
from pipeline.planner.choose import ALIKE, OFFLOADS, Candidate, Cut, Layouts, Site, Timed, ranked
from pipeline.planner.layer_time import Rates, layer_time, loss_time
from pipeline.planning.arch import LlamaArch
from pipeline.planning.layer_plan import LayerPlan
from pipeline.planning.memory import estimate_memory
from pipeline.planning.recompute import policy_of


def kind_of(engine: str, cut: Cut) -> str:
    """A layout's kind: its engine, and whether tensors or layers are cut."""
    return " + ".join([engine, *(["TP"] if cut.tp > 1 else []), *(["PP"] if cut.pp > 1 else [])])


class Bounds:
    """What layouts take at the least."""

    def __init__(self, layouts: Layouts) -> None:
        self._layouts, self._rates, config = layouts, Rates(layouts.site.gpu), layouts.config
        self._policies = {word: policy_of(word, config.train.gate_up) for word in layouts.words}
        self._streams = config.train.stream is not None
        # Of a GPU's memory an engine takes least that offloads all it can.
        least = {"megatron": OffloadConfig(), "zero3": OFFLOADS[-1]}
        self._least = {
            engine: replace(config, parallel=ParallelConfig(engine=engine, offload=least[engine]))
            for engine in layouts.engines(Cut(1, 1, 1, 1))
        }
        # Once for all numbers of stages and replicas.
        self._layer, self._parts = cache(self._layer_plan), cache(self._layer_and_loss)

    def _layer_plan(self, tp: int, cp: int, micro_batch: int) -> LayerPlan:
        plan = LayerPlan.of(self._layouts.config, self._layouts.arch, GridPlan(tp, cp, 1, 1))
        return replace(plan, micro_batch=micro_batch)

    def _layer_and_loss(self, tp: int, cp: int, micro_batch: int, word: str) -> tuple[float, float]:
        plan = self._layer(tp, cp, micro_batch)
        time = layer_time(plan, self._policies[word], self._rates)
        busy = sum(time.parts.values())
        return busy + time.waiting(busy), sum(loss_time(plan, self._rates).values())

    def seconds(self, cut: Cut, word: str) -> float:
        """Of an optimizer step, that no layout of a cut undercuts, whatever its engine and offload.

        Args:
            word: of train.recompute, for all layers.
        """
        config = self._layouts.config
        if self._streams and config.model.base == "fp8":
            return 0.0  # chunks have fewer tiles to copy (`work._moved`)
        layer, loss = self._parts(cut.tp, cut.cp, cut.micro_batch, word)
        micro_batches = config.train.global_batch // (cut.micro_batch * cut.replicas(self._layouts.site.gpus))
        # A stage waits while those before and behind it work.
        return (micro_batches + cut.pp - 1) * (-(-self._layouts.arch.layers // cut.pp) * layer + loss)

    def may_fit(self, cut: Cut, engine: str, word: str) -> bool:
        """Whether a GPU can hold what no layout of a cut does without, all offloaded that can be."""
        if self._streams:
            return True  # chunks grow with the room there is
        plan, layers = self._layer(cut.tp, cut.cp, cut.micro_batch), -(-self._layouts.arch.layers // cut.pp)
        grid = GridPlan(cut.tp, cut.cp, cut.replicas(self._layouts.site.gpus), cut.pp)
        least = estimate_memory(self._least[engine], plan, grid, (self._policies[word],) * layers)
        return least.gpu_total <= self._layouts.site.gpu.memory


def best_by_kind(config: RunConfig, stored: LlamaArch, site: Site) -> dict[str, Timed]:
    """Of every kind of layout that fits the best, the best kind first: those that `ranked(candidates(...))` has.

    Raises:
        ConfigError: the GPUs or the model lack what model.base needs.
    """
    layouts = Layouts(config, stored, site)
    bounds = Bounds(layouts)
    cuts = list(layouts.cuts())
    each = ((at, rank, word) for at in range(len(cuts)) for rank, word in enumerate(layouts.words))
    least = [(bounds.seconds(cuts[at], word), at, rank, word) for at, rank, word in each]
    fastest: dict[str, float] = {}
    fitting: list[tuple[tuple[int, ...], Candidate]] = []
    for seconds, at, rank, word in sorted(least):
        for number, engine in enumerate(layouts.engines(cuts[at])):
            kind = kind_of(engine, cuts[at])
            # Within ALIKE of the fastest another one may be the better.
            if seconds > (1 + ALIKE) * fastest.get(kind, float("inf")) or not bounds.may_fit(cuts[at], engine, word):
                continue
            for offload, one in enumerate(layouts.of(cuts[at], engine, (word,))):
                if one.fits:
                    fastest[kind] = min(fastest.get(kind, float("inf")), one.time.total)
                    fitting.append(((at, number, offload, rank), one))
    # Of equally good ones the first is the best, in the order in which `candidates` has them.
    kinds: dict[str, Timed] = {}
    for timed in ranked([one for _, one in sorted(fitting, key=itemgetter(0))]):
        candidate = timed.candidate
        kinds.setdefault(kind_of(candidate.plan.config.parallel.engine, candidate.cut), timed)
    return kinds
