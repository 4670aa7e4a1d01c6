"""Grid and batch arithmetic, decided once, before torch is imported.

Axis order is megatron's, fastest first: tp, cp, dp, pp. A rank's coordinates are one reshape of range(world).
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.errors import ConfigError


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

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(tp, cp, dp, pp) coordinates of `rank`."""
        tp = rank % self.tp
        cp = rank // self.tp % self.cp
        dp = rank // (self.tp * self.cp) % self.dp
        return tp, cp, dp, rank // (self.tp * self.cp * self.dp)


def plan_grid(world_size: int, tp: int, cp: int, pp: int) -> GridPlan:
    """Give data parallelism what tp x cp x pp leaves of the world.

    Raises:
        ConfigError: the model-parallel axes do not divide the world.
    """
    model = tp * cp * pp
    if world_size % model:
        raise ConfigError(
            f"parallel: tp {tp} x cp {cp} x pp {pp} = {model} does not divide the {world_size} launched processes; "
            f"launch a multiple of {model}, or shrink an axis."
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
