"""Run-time invariants: copies in sync, frozen weights unchanged, adapters starting at zero, nothing non-finite.

Weights are compared by sums over their bits, made on their device: a few bytes a parameter travel, and nothing the size
of a weight is allocated. A violation raises the same error on every rank, so that none is left waiting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
    starts_zero: bool = False
    """LoRA's B factor."""
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


class RunChecks:
    """The invariants of one run. Every method is collective, and raises `InvariantViolated` alike on all ranks.

    Make it before the first step: what the frozen weights hold then is what they must keep.

    Args:
        groups: the grid.
        parameters: all of this rank's, in model order: the same list on replicas.
        moments: gives (name, tensor) of the optimizer state this rank holds.
    """

    def __init__(
        self,
        groups: Groups,
        parameters: Iterable[Checked],
        moments: Callable[[], Iterable[tuple[str, torch.Tensor]]] = lambda: (),
    ) -> None:
        self.groups, self.parameters, self.moments = groups, list(parameters), moments
        self.trained = [one for one in self.parameters if one.trained]
        self.frozen = [one for one in self.parameters if not one.trained]
        self._frozen_sums = self._sums(self.frozen)

    def at_start(self, step: int) -> None:
        """Before the first step of this process; `step` are done already (resumed), 0: a new run."""
        self.check_replicas(step, everything=True)
        if step == 0:
            self.check_adapters_start_at_zero()

    def after_step(self, step: int) -> None:
        """The cheap ones, when `step` optimizer steps are done."""
        # One agreement for both: every rank takes part in the comparison whatever it found.
        self._agree(self._out_of_sync(step, self.trained) or self._non_finite_weight(step))

    def before_save(self, step: int) -> None:
        """The dear ones, so that nothing broken is saved."""
        self.check_frozen(step)
        self.check_finite(step)

    def check_replicas(self, step: int, everything: bool = False) -> None:
        """Copies of a parameter are equal to the bit: over dp x cp, over tp if replicated, over both ends if tied.

        Args:
            everything: frozen ones too, such as base checkpoints that differ between machines.
        """
        copies = [one for one in self.parameters if not one.sharded]
        self._agree(self._out_of_sync(step, copies if everything else self.trained))

    def check_frozen(self, step: int) -> None:
        """No frozen weight changed since the run began."""
        changed = (self._sums(self.frozen) != self._frozen_sums).any(dim=1).nonzero().flatten().tolist()
        found = None
        if changed:
            found = self._told(
                step,
                f"the frozen weight {self.frozen[changed[0]].name} changed since this process started ({len(changed)} "
                "such); nothing writes to it, so suspect this rank's memory, and rerun to resume from the last "
                "checkpoint",
            )
        self._agree(found)

    def check_adapters_start_at_zero(self) -> None:
        """Every B factor is zero before the first step: training starts at the base model."""
        wrong = [one.name for one in self.trained if one.starts_zero and bool(one.parameter.detach().any())]
        found = None
        if wrong:
            found = self._told(
                0,
                f"{wrong[0]} is not zero before the first step ({len(wrong)} such), so training would not start at the "
                "base model; empty the output folder, and report this if it comes again",
            )
        self._agree(found)

    def check_finite(self, step: int) -> None:
        """No trained weight and no moment of the optimizer is infinite or NaN."""
        self._agree(self._non_finite_weight(step) or self._non_finite(step, list(self.moments())))

    def _sums(self, chosen: Sequence[Checked]) -> torch.Tensor:
        return bit_sums([one.parameter for one in chosen], self.groups.device)

    def _told(self, step: int, what: str) -> str:
        return f"Step {step}, rank {self.groups.env.rank}: {what}."

    def _out_of_sync(self, step: int, chosen: Sequence[Checked]) -> str | None:
        sums, plan, groups = self._sums(chosen), self.groups.plan, self.groups
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
            "tools.doctor on this configuration if it comes again."
        )

    def _non_finite_weight(self, step: int) -> str | None:
        return self._non_finite(step, [(one.name, one.parameter) for one in self.trained])

    def _non_finite(self, step: int, named: Sequence[tuple[str, torch.Tensor]]) -> str | None:
        # An infinity norm keeps NaN and needs no memory; one look at the device for all of them.
        norms = [torch.linalg.vector_norm(t.detach(), torch.inf, dtype=torch.float32) for _, t in named if t.numel()]
        if not norms:
            return None
        wrong = (~torch.stack(norms).isfinite()).nonzero().flatten().tolist()
        if not wrong:
            return None
        name = [name for name, tensor in named if tensor.numel()][wrong[0]]
        return self._told(
            step,
            f"{name} holds a value that is not finite ({len(wrong)} such tensors); lower train.lr or check the data, "
            "and rerun to resume from the last checkpoint",
        )

    def _agree(self, found: str | None) -> None:
        """Raise on all ranks what the lowest rank that found something has to say."""
        world, device = self.groups.plan.world_size, self.groups.device
        if world == 1:
            if found is not None:
                raise InvariantViolated(found)
            return
        rank = self.groups.env.rank
        first = torch.tensor(world if found is None else rank, device=device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        speaker = int(first)
        if speaker == world:
            return
        raw = (found or "").encode()[:_TEXT_BYTES]
        text = torch.tensor(list(raw.ljust(_TEXT_BYTES, b"\0")), dtype=torch.uint8, device=device)
        dist.broadcast(text, speaker)
        raise InvariantViolated(bytes(text.tolist()).rstrip(b"\0").decode(errors="ignore"))
