"""Copies that must be equal to the bit: which parameters ranks hold in common, and how a difference is told.

Weights are compared by sums over their bits, made on their device: a few bytes a parameter travel, and nothing the size
of a weight is allocated. A violation raises the same error on every rank, so that none is left waiting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.errors import LongspanError
from parallel.world.groups import Groups

_TEXT_BYTES = 1024
"""Longest message that travels."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class InvariantViolated(LongspanError):
    """Something that must hold in every correct run does not; the message names step, rank and parameter."""


@dataclass(frozen=True)
class Checked:
    """One parameter of this rank, and what must hold of it."""

    name: str
    """Canonical."""
    parameter: torch.Tensor
    trained: bool
    tied: bool = False
    """The first and the last pipeline stage each hold a copy."""
    sharded: bool = False
    """Every rank of dp x cp holds another share (engine zero3): there is no copy to compare with."""

    @property
    def replicated(self) -> bool:
        """Whether every tensor-parallel rank holds the same values (megatron marks those that are cut)."""
        return not getattr(self.parameter, "tensor_model_parallel", False)


def bit_sums(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """int64 [n, 2]: of each tensor the sum of its elements' bits as integers, and that of every second element."""
    sums = torch.zeros(len(tensors), 2, dtype=torch.int64, device=device)
    for row, tensor in zip(sums, tensors, strict=True):
        bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
        row[0], row[1] = bits.sum(dtype=torch.int64), bits[::2].sum(dtype=torch.int64)
    return sums


class Replicas:
    """The parameters of this rank of which other ranks hold copies. Its methods are collective.

    Args:
        groups: the grid.
        parameters: all of this rank's, in model order: the same list on replicas.
    """

    def __init__(self, groups: Groups, parameters: Iterable[Checked]) -> None:
        self.groups = groups
        self._copies = [one for one in parameters if not one.sharded]

    def out_of_sync(self, step: int, everything: bool = False) -> str | None:
        """What to say if a copy differs: over dp x cp, over tp if replicated, over both ends if tied. None: none does.

        Args:
            step: optimizer steps done, for the message.
            everything: frozen ones too, such as base checkpoints that differ between machines.
        """
        chosen = [one for one in self._copies if everything or one.trained]
        groups, plan = self.groups, self.groups.plan
        sums = bit_sums([one.parameter for one in chosen], groups.device)
        found = self._unlike(step, groups.data, "data- and context-parallel", chosen, sums)
        if plan.tp > 1:
            # A frozen weight is checked against its file's slices on loading; only what trains can drift apart.
            rows = [row for row, one in enumerate(chosen) if one.trained and one.replicated]
            same = [chosen[row] for row in rows]
            found = self._unlike(step, groups.collection.tp, "tensor-parallel", same, sums[rows]) or found
        rows = [row for row, one in enumerate(chosen) if one.tied]
        if rows and plan.pp > 1:
            same = [chosen[row] for row in rows]
            found = self._unlike(step, groups.collection.embd, "first and last pipeline", same, sums[rows]) or found
        return found

    def _unlike(
        self, step: int, group: dist.ProcessGroup, axis: str, chosen: Sequence[Checked], sums: torch.Tensor
    ) -> str | None:
        """What to say if some rank's sums differ; collective over `group`, whose ranks list the same parameters."""
        size = dist.get_world_size(group)
        if size == 1 or not chosen:
            return None
        gathered = [torch.empty_like(sums) for _ in range(size)]
        dist.all_gather(gathered, sums.contiguous(), group=group)
        every = torch.stack(gathered).cpu()
        rows = (every != every[0]).any(dim=2).any(dim=0).nonzero().flatten().tolist()
        if not rows:
            return None
        values = [tuple(pair) for pair in every[:, rows[0]].tolist()]
        common, _ = Counter(values).most_common(1)[0]
        ranks = dist.get_process_group_ranks(group)
        odd = [rank for rank, value in zip(ranks, values, strict=True) if value != common]
        kept = [rank for rank, value in zip(ranks, values, strict=True) if value == common]
        return (
            f"Step {step}, rank {odd[0]}: {chosen[rows[0]].name} is not bit-equal to its copy on rank {kept[0]} "
            f"({axis} ranks; {len(rows)} such parameters); rerun to resume from the last checkpoint, and run "
            "longspan doctor on this configuration if it comes again."
        )


def agree(groups: Groups, found: str | None) -> None:
    """Raise on all ranks what the lowest rank that found something has to say; collective.

    Raises:
        InvariantViolated: some rank found something.
    """
    world, device = groups.plan.world_size, groups.device
    if world == 1:
        if found is not None:
            raise InvariantViolated(found)
        return
    rank = groups.env.rank
    first = torch.tensor(world if found is None else rank, device=device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    speaker = int(first)
    if speaker == world:
        return
    raw = (found or "").encode()[:_TEXT_BYTES]
    text = torch.tensor(list(raw.ljust(_TEXT_BYTES, b"\0")), dtype=torch.uint8, device=device)
    dist.broadcast(text, speaker)
    raise InvariantViolated(bytes(text.tolist()).rstrip(b"\0").decode(errors="ignore"))
