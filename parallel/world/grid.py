"""Grid and batch arithmetic, decided once, before torch is imported.

Axis order is megatron's, fastest first: tp, cp, dp, pp. A rank's coordinates are one reshape of range(world).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from parallel.errors import ConfigError


class Coordinates(NamedTuple):
    """Where a rank stands on each axis, counted from 0."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class GridPlan:
    """Sizes of the four axes; their product is the world."""

    tp: int
    cp: int
    dp: int
    pp: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` stands."""
        return Coordinates(
            tp=rank % self.tp,
            cp=rank // self.tp % self.cp,
            dp=rank // (self.tp * self.cp) % self.dp,
            pp=rank // (self.tp * self.cp * self.dp),
        )

    def rank(self, tp: int, cp: int, dp: int, pp: int) -> int:
        """Inverse of `coordinates`."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def shard_tokens(self, sequence: int) -> int:
        """Tokens L of one context-parallel shard of a sequence of N tokens.

        The sequence is padded on the right to cp x L; L is a multiple of tp, since sequence parallelism cuts it again.
        """
        unit = self.cp * self.tp
        return -(-sequence // unit) * self.tp


def plan_grid(world_size: int, tp: int, cp: int, pp: int) -> GridPlan:
    """Give data parallelism what tp x cp x pp leaves of the world.

    Raises:
        ConfigError: the model-parallel axes do not divide the world; names the nearest worlds that work.
    """
    model = tp * cp * pp
    if world_size % model:
        low = world_size // model * model
        nearest = f"{low} or {low + model}" if low else f"{model}"
        raise ConfigError(
            f"parallel: tp {tp} x cp {cp} x pp {pp} = {model} does not divide the {world_size} launched processes; "
            f"launch {nearest}, or shrink an axis."
        )
    return GridPlan(tp=tp, cp=cp, dp=world_size // model, pp=pp)


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step's sequences are spread."""

    global_batch: int
    """Sequences an optimizer step."""
    micro_batch: int
    """Sequences a forward pass."""
    dp: int
    """Data-parallel ranks."""

    @property
    def accumulation(self) -> int:
        """Micro-batches a rank runs for one optimizer step."""
        return self.global_batch // (self.micro_batch * self.dp)


def plan_batch(global_batch: int, micro_batch: int, dp: int) -> BatchPlan:
    """Check that the batch divides over ranks and micro-batches.

    Raises:
        ConfigError: it does not; names the nearest global batches that work.
    """
    unit = micro_batch * dp
    if global_batch % unit:
        low = global_batch // unit * unit
        nearest = f"{low} or {low + unit}" if low else f"{unit}"
        raise ConfigError(
            f"train.global_batch: {global_batch} is not a multiple of micro_batch {micro_batch} x {dp} data-parallel "
            f"ranks = {unit}; use {nearest}."
        )
    return BatchPlan(global_batch, micro_batch, dp)


def plan_stages(layers: int, pp: int, virtual: int = 1) -> tuple[range, ...]:
    """Layers of every pipeline chunk, in order; chunk v * pp + p is chunk v of stage p (megatron's interleaving).

    The first chunk also embeds and the last one also makes the loss, so chunks between them take the remainder first.

    Raises:
        ConfigError: a chunk would have no layer.
    """
    chunks = pp * virtual
    if chunks > layers:
        raise ConfigError(
            f"parallel.pp: {pp} x parallel.virtual {virtual} = {chunks} pipeline chunks need at least as many layers, "
            f"and the model has {layers}; use at most {max(1, layers // virtual)} stages."
        )
    base, extra = divmod(layers, chunks)
    middle_first = [*range(1, chunks - 1), 0, chunks - 1]
    longer = set(middle_first[:extra])
    ranges, start = [], 0
    for chunk in range(chunks):
        stop = start + base + (chunk in longer)
        ranges.append(range(start, stop))
        start = stop
    return tuple(ranges)


def _nearest(size: int, *counts: int) -> str:
    """Divisors of all counts nearest to `size`, as text."""
    working = [n for n in range(1, min(counts) + 1) if not any(count % n for count in counts)]
    below = [n for n in working if n < size][-1:]
    above = [n for n in working if n > size][:1]
    return " or ".join(str(n) for n in below + above)


def check_model_fits(plan: GridPlan, heads: int, kv_heads: int, ffn: int) -> None:
    """Check that tensor parallelism cuts whole KV groups and equal MLP slices.

    Raises:
        ConfigError: it does not; names the axis and the nearest sizes that work.
    """
    if heads % plan.tp or kv_heads % plan.tp or ffn % plan.tp:
        raise ConfigError(
            f"parallel.tp: {plan.tp} does not divide the model's {kv_heads} key-value heads, {heads} query heads and "
            f"{ffn} MLP channels alike (key-value heads are never replicated here); use "
            f"{_nearest(plan.tp, heads, kv_heads, ffn)}, and give the other ranks to parallel.cp."
        )


def check_interleaving(pp: int, virtual: int, accumulation: int) -> None:
    """Check what megatron's interleaved schedule needs.

    Raises:
        ConfigError: it is asked for without a pipeline, or the micro-batches do not fill whole rounds.
    """
    if virtual == 1:
        return
    if pp == 1:
        raise ConfigError(f"parallel.virtual: {virtual} interleaves pipeline stages, but parallel.pp is 1; use 1.")
    if accumulation % pp:
        low = accumulation // pp * pp
        nearest = f"{low} or {low + pp}" if low else f"{pp}"
        raise ConfigError(
            f"parallel.virtual: {virtual} needs a multiple of pp {pp} micro-batches an optimizer step, and there are "
            f"{accumulation}; change train.global_batch so that they are {nearest}."
        )
