"""The run-time invariants of a training run (`checks: true`): copies in sync, frozen weights unchanged, adapters that
start at zero, nothing non-finite."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import torch

from parallel.health.replicas import Checked, Replicas, agree, bit_sums
from parallel.world.groups import Groups
from pipeline.model.rank_model import RankModel
from pipeline.planning.tensors import to_hf
from pipeline.training.optimizer import TrainableAdamW

BESIDE = re.compile(r"\.weight_\w+$")
"""How the names end of what a matrix in 8 or 4 bits has beside its codes (`quantized_linear.keep`)."""
LORA_B = ".lora_B.weight"
"""How the canonical names of B factors end."""


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
        self._replicas = Replicas(groups, self.parameters)
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
        agree(self.groups, self._replicas.out_of_sync(step) or self._non_finite_weight(step))

    def before_save(self, step: int) -> None:
        """The dear ones, so that nothing broken is saved."""
        self.check_frozen(step)
        self.check_finite(step)

    def check_replicas(self, step: int, everything: bool = False) -> None:
        """Copies of a parameter are equal to the bit (see `Replicas.out_of_sync`)."""
        agree(self.groups, self._replicas.out_of_sync(step, everything))

    def check_frozen(self, step: int) -> None:
        """No frozen weight changed since the run began."""
        changed = (self._sums(self.frozen) != self._frozen_sums).any(dim=1).nonzero().flatten().tolist()
        found = None
        if changed:
            found = self._sentence(
                step,
                f"the frozen weight {self.frozen[changed[0]].name} changed since this process started ({len(changed)} "
                "such); nothing writes to it, so suspect this rank's memory, and rerun to resume from the last "
                "checkpoint",
            )
        agree(self.groups, found)

    def check_adapters_start_at_zero(self) -> None:
        """Every B factor is zero before the first step: training starts at the base model."""
        wrong = [one.name for one in self.trained if one.name.endswith(LORA_B) and bool(one.parameter.detach().any())]
        found = None
        if wrong:
            found = self._sentence(
                0,
                f"{wrong[0]} is not zero before the first step ({len(wrong)} such), so training would not start at the "
                "base model; empty the output folder, and report this if it comes again",
            )
        agree(self.groups, found)

    def check_finite(self, step: int) -> None:
        """No trained weight and no moment of the optimizer is infinite or NaN."""
        agree(self.groups, self._non_finite_weight(step) or self._non_finite(step, list(self.moments())))

    def _sums(self, chosen: Sequence[Checked]) -> torch.Tensor:
        return bit_sums([one.parameter for one in chosen], self.groups.device)

    def _sentence(self, step: int, what: str) -> str:
        return f"Step {step}, rank {self.groups.env.rank}: {what}."

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
        return self._sentence(
            step,
            f"{name} holds a value that is not finite ({len(wrong)} such tensors); lower train.lr or check the data, "
            "and rerun to resume from the last checkpoint",
        )


def run_checks(groups: Groups, model: RankModel, optimizer: TrainableAdamW) -> RunChecks:
    """Take note of the frozen weights as they are now; make it before the first step."""
    tied = model.arch.tied and groups.plan.pp > 1
    checked = []
    for name, parameter in model.canonical_parameters():
        if model.is_sharded(parameter):
            continue
        checked.append(
            Checked(
                # A fused frozen weight goes by the first of the tensors it holds, and so do its scales.
                name=to_hf(BESIDE.sub(".weight", name))[0][0],
                parameter=parameter,
                trained=parameter.requires_grad,
                tied=tied and name == "embedding.weight",
            )
        )
    if model.shards is not None:
        # Four bytes at a time: sums of single ones would take four times as long.
        words = ((name, share.view(torch.int32)) for name, share in model.shards.shares())
        checked += [Checked(name, share, trained=False, sharded=True) for name, share in words]
    return RunChecks(groups, checked, optimizer.own_moments)
