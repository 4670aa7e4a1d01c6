"""A step whose loss or gradient norm is far beyond the last ones' is computed once more, before the weights change.

From the same weights, data and random state the same numbers must come. If they do, the data are the cause, and the
windows that lost most are named; if not, some rank computed wrongly (a GPU, memory, a race, the network), and the rank
whose own share of loss or gradient differs is named. Training goes on with the second computation.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from parallel.errors import LongspanError
from parallel.world.collectives import agree, of_every_rank
from parallel.world.groups import Groups
from pipeline.checkpoint.compatibility import DataStart
from pipeline.config.run import RunConfig
from pipeline.data.loader import Batch, TrainLoader
from pipeline.data.mixed import MixedWindows
from pipeline.data.packing import IGNORE, Windows
from pipeline.training.optimizer import TrainableAdamW

HISTORY, LEAST, LEVEL = 64, 16, 9
"""Steps that are remembered, how many there must be before any is judged by them, and the last of them, whose median
is where training stands."""
SIGMAS = 8.0
"""Standard deviations above it that are far beyond: estimated from how much neighbouring steps differ, in the median,
which neither a trend nor a few wild steps change much."""
LOSS_SHARE, NORM_TIMES = 0.05, 3.0
"""What is never far: a loss up to so much of that median above it, a norm up to so many times the median."""
QUIET = 8
"""Steps after a rerun in which a finite step is not run again: another level is no spike."""
TOLERANCE = {"cpu": (0.0, 0.0), "cuda": (1e-3, 5e-2)}
"""Relative difference of (losses, norms) that is none. Kernels on a CPU are deterministic here; on a GPU atomic
additions of a backward come in any order."""
WORST, NAMED = 3, 4
"""Windows, and ranks, that a sentence names."""
DATA, MACHINE = 1, 2
"""What `rerun` is in a line of metrics."""


@dataclass(frozen=True)
class Figures:
    """What a rank saw of one forward and backward."""

    own_loss: float
    """Its share of the summed loss, nats."""
    own_norm: float
    """L2 norm of its own gradients, before any sum over replicas."""
    loss: float
    """Of the step, nats a token: alike on every rank."""
    norm: float
    """Of the step: alike on every rank."""


@dataclass(frozen=True)
class Lost:
    """A micro-batch, and what it lost."""

    windows: tuple[int, ...]
    loss: float
    """Mean over its scored tokens, nats."""


class Recent:
    """Losses and norms of the last steps, and what lies far beyond them."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._norms: deque[float] = deque(maxlen=HISTORY)
        self._quiet = 0

    def take(self, loss: float, norm: float) -> None:
        """Remember a step, if it is finite."""
        self._quiet = max(0, self._quiet - 1)
        if math.isfinite(loss) and math.isfinite(norm):
            self._losses.append(loss)
            self._norms.append(norm)

    def rest(self) -> None:
        """A step was run again: leave the next ones alone."""
        self._quiet = QUIET

    def bounds(self) -> tuple[float, float]:
        """Largest loss and norm that are not far beyond; infinite while there are too few to tell."""
        if len(self._losses) < LEAST:
            return math.inf, math.inf
        loss, spread = _level(list(self._losses))
        norm, ratio = _level([math.log(max(each, 1e-30)) for each in self._norms])
        return loss + max(spread, LOSS_SHARE * abs(loss)), math.exp(norm + max(ratio, math.log(NORM_TIMES)))

    def beyond(self, loss: float, norm: float) -> str:
        """What is far beyond, in words; empty: nothing is."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss:g} and gradient norm {norm:g} are not finite"
        highest = (math.inf, math.inf) if self._quiet else self.bounds()
        found = [
            f"{name} {value:.4g} is far beyond the last {len(self._losses)} steps' (bound {bound:.4g})"
            for name, value, bound in (("loss", loss, highest[0]), ("gradient norm", norm, highest[1]))
            if value > bound
        ]
        return " and ".join(found)


def _level(values: Sequence[float]) -> tuple[float, float]:
    """Where a series stands, and SIGMAS standard deviations of its noise.

    Of normal noise, neighbours differ by sqrt(2) standard deviations' worth, and the median of what is normal without
    its sign is 1 / 1.4826 standard deviations.
    """
    apart = statistics.median(abs(one - two) for one, two in pairwise(values))
    return statistics.median(values[-LEVEL:]), SIGMAS * 1.4826 * apart / math.sqrt(2)


def differs(one: float, other: float, tolerance: float) -> bool:
    """Whether two numbers of the same computation are not the same; all that is not finite is alike."""
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.isfinite(one) != math.isfinite(other)
    return abs(one - other) > tolerance * max(abs(one), abs(other))


def blame(first: Sequence[Figures], again: Sequence[Figures], tolerance: tuple[float, float]) -> tuple[list[int], str]:
    """Ranks that computed something else the second time, and where: `itself`, or in `the sums over the ranks`.

    Args:
        first, again: of every rank.
        tolerance: see TOLERANCE.

    Returns:
        The ranks whose own share differs; if none does, those that were left with another loss or norm of the step.
        Empty: everything is the same.
    """
    loss, norm = tolerance
    pairs = list(enumerate(zip(first, again, strict=True)))
    own = [
        rank
        for rank, (one, two) in pairs
        if differs(one.own_loss, two.own_loss, loss) or differs(one.own_norm, two.own_norm, norm)
    ]
    if own:
        return own, "itself"
    whole = [
        rank for rank, (one, two) in pairs if differs(one.loss, two.loss, loss) or differs(one.norm, two.norm, norm)
    ]
    return whole, "the sums over the ranks"


def apart(figures: Sequence[Figures], tolerance: tuple[float, float]) -> list[int]:
    """Ranks that have another loss or gradient norm of the step than most: all should have the same.

    Of as many on either side, those are wrong whose figures are not finite, or else the higher ranks.
    """

    def alike(one: Figures, other: Figures) -> bool:
        loss, norm = tolerance
        return not (differs(one.loss, other.loss, loss) or differs(one.norm, other.norm, norm))

    if all(alike(one, figures[0]) for one in figures):
        return []
    finite = {id(one): math.isfinite(one.loss) and math.isfinite(one.norm) for one in figures}
    usual = max(figures, key=lambda one: (sum(alike(one, other) for other in figures), finite[id(one)]))
    return [rank for rank, one in enumerate(figures) if not alike(one, usual)]


class SpikeWatch:
    """Judges every step, and has a bad one computed again. Its methods are collective.

    Args:
        config: of the run.
        groups: the grid.
        loader: tells which windows a step reads.
        optimizer: knows each rank's own gradients.
        manifest: the checkpoints', which says where in the data the run stands.
    """

    def __init__(
        self,
        config: RunConfig,
        groups: Groups,
        loader: TrainLoader,
        optimizer: TrainableAdamW,
        manifest: dict[str, Any],
    ) -> None:
        self._config, self._groups, self._loader = config, groups, loader
        self._optimizer, self._manifest = optimizer, manifest
        self._recent = Recent()
        self._blamed: Counter[tuple[int, ...]] = Counter()
        self._own_loss = torch.zeros(())
        optimizer.keep_own_norms()

    def note(self, total: torch.Tensor) -> None:
        """This rank's summed loss of a forward and backward, before it is summed over the ranks."""
        self._own_loss = total.clone()

    def judge(
        self,
        step: int,
        row: dict[str, Any],
        again: Callable[[torch.Tensor], dict[str, Any]],
        say: Callable[[str], None],
    ) -> dict[str, Any]:
        """The figures to go on with: `row`, or those of the step's second computation.

        Args:
            step: 0-based.
            row: loss, grad_norm and more of the step; the gradients lie ready, and the weights are the step's own.
            again: computes the step once more from the same state, and fills in the summed loss of each micro-batch
                (fp64 [micro-batches]).
            say: shows a sentence.
        """
        if self._config.in_full(step) != self._config.in_full(step - 1):
            # Another attention has another level.
            self._recent = Recent()
        found = self._recent.beyond(row["loss"], row["grad_norm"])
        # Agreed on: a rank whose memory fails may be the only one that sees it.
        (somewhere,), _ = agree(self._groups, [bool(found)])
        if not somewhere:
            self._recent.take(row["loss"], row["grad_norm"])
            return row
        first = self._figures(row)
        batches = self._loader.step(step)
        each = torch.zeros(len(batches), dtype=torch.float64, device=self._groups.device)
        row = again(each)
        second = self._figures(row)
        kind, cause = self._verdict(step, batches, each, of_every_rank(self._groups, first), second)
        say(f"warning: step {step + 1}: {found or 'one rank has figures that are far beyond the last ones'}; {cause}")
        self._recent.take(row["loss"], row["grad_norm"])
        self._recent.rest()
        return row | {"rerun": kind}

    def _figures(self, row: dict[str, Any]) -> list[float]:
        own = float(self._own_loss), float(self._optimizer.own_norm())
        return list(astuple(Figures(*own, row["loss"], row["grad_norm"])))

    def _verdict(
        self,
        step: int,
        batches: Sequence[Batch],
        each: torch.Tensor,
        first: Sequence[tuple[list[float], str]],
        second: list[float],
    ) -> tuple[int, str]:
        """DATA or MACHINE, and the sentence's end; alike on every rank.

        Raises:
            LongspanError: ranks are left with different figures of the step, also the second time: they would go
                different ways.
        """
        again = of_every_rank(self._groups, second)
        lost = self._lost(step, batches, each)
        before, after = ([Figures(*numbers) for numbers, _ in found] for found in (first, again))
        tolerance = TOLERANCE[self._groups.device.type]
        odd = apart(after, tolerance)
        if odd:
            usual = next(one for rank, one in enumerate(after) if rank not in odd)
            raise LongspanError(
                f"step {step + 1}: rank {odd[0]} on {again[odd[0]][1]} has loss {after[odd[0]].loss:g} and gradient "
                f"norm {after[odd[0]].norm:g}, also when computed again, where others have {usual.loss:g} and "
                f"{usual.norm:g}: its GPU or memory fails. Leave that machine out; the same command resumes from the "
                "newest checkpoint."
            )
        ranks, where = blame(before, after, tolerance)
        if not ranks:
            worst = sorted(lost, key=lambda one: math.inf if math.isnan(one.loss) else one.loss, reverse=True)[:WORST]
            return DATA, (
                "computed again from the same state it is the same on every rank, so none computes wrongly now; look "
                "at the data, train.lr or weights that were damaged before. Most was lost in "
                + "; ".join(_told(one, self._loader.dataset, self._config) for one in worst)
            )
        self._blamed[tuple(ranks)] += 1
        named = ", ".join(f"rank {rank} on {again[rank][1]}" for rank in ranks[:NAMED])
        more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
        rank = ranks[0]
        numbers = (
            f"loss {before[rank].loss:g}, then {after[rank].loss:g}, gradient norm {before[rank].norm:g}, then "
            f"{after[rank].norm:g}"
        )
        times = self._blamed[tuple(ranks)]
        often = f" (the {times}th time)" if times > 3 else ("", "", " (the second time)", " (the third time)")[times]
        if where == "itself":
            cause = (
                f"{named}{more} computed something else from the same state{often} ({numbers}): the hardware is the "
                "cause, or a race"
            )
            if len(ranks) > 1:
                cause += ", on one of them, since ranks that share sequences or layers pass it on to each other"
        elif len(ranks) < len(after):
            cause = f"{named}{more} was left with something else after the same sums over the ranks{often} ({numbers})"
        else:
            cause = (
                f"every rank's own share was the same and the sums over the ranks were not{often} ({numbers}): suspect "
                "the links between them"
            )
        return MACHINE, (
            f"{cause}; training goes on with the second computation. If it comes again, test the machine (dcgmi diag "
            "-r 3, nvidia-smi -q -d ECC) or leave it out"
        )

    def _lost(self, step: int, batches: Sequence[Batch], each: torch.Tensor) -> list[Lost]:
        """Every micro-batch of the step, over all replicas."""
        groups, train = self._groups, self._config.train
        place, count = groups.coordinates, len(batches)
        table = torch.zeros(groups.plan.dp * count, 2, dtype=torch.float64)
        mine = table[place.dp * count : (place.dp + 1) * count]
        read = DataStart.of(self._manifest).sequences(step, train.global_batch)
        windows = self._loader.dataset.order(train.seed, read, train.global_batch)
        windows = windows.reshape(len(table), train.micro_batch)
        if place.tp == 0:  # tensor-parallel ranks have the same loss
            mine[:, 0] = each.cpu()
        if place.tp == place.cp == place.pp == 0:
            for row, batch in zip(mine, batches, strict=True):
                row[1] = int((batch.labels != IGNORE).sum())
        if groups.plan.world_size > 1:
            dist.all_reduce(table, group=groups.host)
        return [
            Lost(tuple(own), loss / max(scored, 1.0))
            for own, (loss, scored) in zip(windows.tolist(), table.tolist(), strict=True)
        ]


def _told(one: Lost, dataset: Windows, config: RunConfig) -> str:
    """A micro-batch in words."""
    windows = f"window{'s' * (len(one.windows) > 1)} {', '.join(map(str, one.windows))}"
    held: dict[str, list[int]] = {}
    for window in one.windows:
        number = dataset.source_of(window) if isinstance(dataset, MixedWindows) else None
        source = "data.path" if number is None else config.data.sources[number].path
        held.setdefault(source, []).extend(dataset.documents(window))
    documents = [
        f"document {min(ids)} of {source}"
        if min(ids) == max(ids)
        else f"documents {min(ids)} to {max(ids)} of {source}"
        for source, ids in held.items()
    ]
    return f"{windows} ({', '.join(documents)}), {one.loss:.4g} nats a token"
