"""AdamW on what trains, and only on that: fp32 masters, fp32 gradient sums, nothing at all for frozen weights.

bf16 keeps 8 significant bits, so neither a sum of micro-batch gradients nor a weight moved by a small learning rate may
live in it: the first loses terms, the second never moves. Gradients are therefore added into one flat fp32 buffer as
autograd produces them, and updates happen on fp32 masters. A parameter that is fp32 already is its own master.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import Parameter
from torch.optim.adamw import adamw

from parallel.errors import CheckpointError

BUCKET_ELEMENTS = 1 << 26
"""Gradient elements (fp32: 256 MiB) reduced by one collective."""

ALIGN_ELEMENTS = 64
"""Every parameter's slice of the flat buffer starts at a multiple of this (256 bytes), for vectorized kernels."""

STEP = "step"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Slot:
    """One trained parameter and what belongs to it."""

    name: str
    group: str
    parameter: Parameter
    master: torch.Tensor
    """fp32, the parameter's shape; shares its memory when the parameter is fp32."""
    gradient: torch.Tensor
    """fp32 view of the flat buffer, the parameter's shape."""
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    steps: torch.Tensor
    """fp32 scalar on the parameter's device: torch's kernels advance it. One each, since they write to it."""

    @property
    def has_copy(self) -> bool:
        return self.master.data_ptr() != self.parameter.data_ptr()


class TrainableAdamW:
    """AdamW (arXiv 1711.05101) with fp32 state for parameters of any float dtype.

    From construction on, each parameter's gradient is added to its slice of one flat fp32 buffer
    (`parameter.main_grad`) as soon as autograd has it, and `parameter.grad` is freed: after a backward it is None.

    Args:
        named_parameters: (canonical name, learning-rate group, parameter), all on one device and requiring gradients.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled, applied to matrices (two dimensions or more) only.
        clip: global L2 norm to clip to; 0 switches clipping off.

    Raises:
        ValueError: nothing to train, a frozen parameter, or a name or parameter given twice.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, str, Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: float = 1.0,
    ) -> None:
        self.betas, self.eps, self.weight_decay, self.clip = betas, eps, weight_decay, clip
        given = list(named_parameters)
        if not given:
            raise ValueError("no parameter to train")
        if len({name for name, _, _ in given}) < len(given) or len({id(p) for _, _, p in given}) < len(given):
            raise ValueError("a name or a parameter is given twice")
        frozen = [name for name, _, parameter in given if not parameter.requires_grad]
        if frozen:
            raise ValueError(f"{frozen[0]} does not require a gradient")
        offsets, end = [], 0
        for _, _, parameter in given:
            offsets.append(end)
            end += -(-parameter.numel() // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
        self._flat = torch.zeros(end, dtype=torch.float32, device=given[0][2].device)
        self._slots = [
            self._make_slot(name, group, parameter, offset)
            for (name, group, parameter), offset in zip(given, offsets, strict=True)
        ]

    def _make_slot(self, name: str, group: str, parameter: Parameter, offset: int) -> _Slot:
        """Allocate one parameter's state and redirect its gradient."""
        gradient = self._flat[offset : offset + parameter.numel()].view(parameter.shape)
        parameter.main_grad = gradient  # type: ignore[attr-defined]
        parameter.register_post_accumulate_grad_hook(_move_gradient)
        data = parameter.detach()
        return _Slot(
            name=name,
            group=group,
            parameter=parameter,
            master=data if data.dtype == torch.float32 else data.float(),
            gradient=gradient,
            exp_avg=torch.zeros_like(data, dtype=torch.float32),
            exp_avg_sq=torch.zeros_like(data, dtype=torch.float32),
            steps=torch.zeros((), dtype=torch.float32, device=data.device),
        )

    @property
    def state_bytes(self) -> int:
        """Bytes of moments and master copies (a parameter that is its own master adds none)."""
        tensors = [t for slot in self._slots for t in (slot.exp_avg, slot.exp_avg_sq)]
        tensors += [slot.master for slot in self._slots if slot.has_copy]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the flat fp32 gradient buffer."""
        return self._flat.numel() * self._flat.element_size()

    def zero_grad(self) -> None:
        """Forget the gradients summed so far."""
        self._flat.zero_()
        for slot in self._slots:
            slot.parameter.grad = None

    def flat_gradients(self) -> list[torch.Tensor]:
        """Views of the whole flat fp32 gradient buffer, in order: what data parallelism sums, one collective each."""
        return list(self._flat.split(BUCKET_ELEMENTS))

    def grad_norm(self, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """Global L2 norm of the summed gradients: fp32 scalar, before clipping.

        Args:
            reduce: for tensor parallelism; gets the squared sums, fp64 [2], of (parameters alike on all ranks,
                parameters with `tensor_model_parallel` set) and returns them as the whole model has them: the first
                unchanged, the second summed over the ranks. Gradients of `sequence_parallel` parameters must have been
                summed over the tensor-parallel group before, which makes them alike.
        """
        replicated: list[torch.Tensor] = []
        sharded: list[torch.Tensor] = []
        for slot in self._slots:
            if getattr(slot.parameter, "shared_copy", False):
                continue
            is_sharded = getattr(slot.parameter, "tensor_model_parallel", False)
            (sharded if is_sharded else replicated).append(slot.gradient)
        norms = [torch.nn.utils.get_total_norm(part).to(self._flat.device) for part in (replicated, sharded)]
        if reduce is None and not sharded:
            return norms[0]
        squares = torch.stack(norms).double().square()
        if reduce is not None:
            squares = reduce(squares)
        return squares.sum().sqrt().float()

    @torch.no_grad()
    def step(self, rates: Mapping[str, float], norm: float) -> None:
        """Clip the summed gradients in place, update the masters, and round them into the parameters.

        Args:
            rates: learning rate of every group.
            norm: what `grad_norm` gave; gradients are scaled by min(1, clip / (norm + 1e-6)), as
                `torch.nn.utils.clip_grad_norm_` does.

        Raises:
            KeyError: a group has no rate.
        """
        scale = self.clip / (norm + 1e-6) if self.clip > 0 else 1.0
        if scale < 1.0:
            self._flat.mul_(scale)
        for group, decays in sorted({_update_kind(slot) for slot in self._slots}):
            chosen = [slot for slot in self._slots if _update_kind(slot) == (group, decays)]
            adamw(
                [slot.master for slot in chosen],
                [slot.gradient for slot in chosen],
                [slot.exp_avg for slot in chosen],
                [slot.exp_avg_sq for slot in chosen],
                [],
                [slot.steps for slot in chosen],
                # One pass over memory, on CPU too, where it is as deterministic as the loop of ten passes.
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=rates[group],
                weight_decay=self.weight_decay if decays else 0.0,
                eps=self.eps,
                maximize=False,
            )
        self._round_masters()

    def _round_masters(self) -> None:
        """Copy the masters into parameters of a narrower dtype."""
        for slot in self._slots:
            if slot.has_copy:
                slot.parameter.detach().copy_(slot.master)

    def masters(self) -> dict[str, torch.Tensor]:
        """fp32 masters by canonical name; live tensors, not copies."""
        return {slot.name: slot.master for slot in self._slots}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Live moments `<name>.exp_avg` and `<name>.exp_avg_sq` (fp32), and `step` (int64 scalar): updates applied.

        Together with `masters` this is everything the next update depends on.
        """
        state = {f"{slot.name}.{moment}": getattr(slot, moment) for slot in self._slots for moment in MOMENTS}
        state[STEP] = self._slots[0].steps.detach().to("cpu", torch.int64)
        return state

    @torch.no_grad()
    def load_state_dict(self, masters: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """Restore masters and moments bit for bit, and round the masters into the parameters.

        Everything is checked before anything is changed.

        Args:
            masters: as from `masters`.
            state: as from `state_dict`.

        Raises:
            CheckpointError: a tensor is missing, unknown, misshaped or not fp32, or the step is no count.
        """
        _check(masters, self.masters(), "trained weights")
        _check({k: v for k, v in state.items() if k != STEP}, self._moments(), "optimizer state")
        done = state.get(STEP)
        if done is None or done.numel() != 1 or done.dtype != torch.int64 or int(done) < 0:
            raise CheckpointError(
                "Checkpoint: the optimizer state has no step count (int64 `step`); resume from another checkpoint."
            )
        for slot in self._slots:
            slot.master.copy_(masters[slot.name])
            for moment in MOMENTS:
                getattr(slot, moment).copy_(state[f"{slot.name}.{moment}"])
            slot.steps.fill_(int(done))
        self._round_masters()

    def _moments(self) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.state_dict().items() if name != STEP}


def _move_gradient(parameter: torch.Tensor) -> None:
    """Add a fresh gradient to the fp32 sum and free it (a post-accumulate hook)."""
    parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None


def _update_kind(slot: _Slot) -> tuple[str, bool]:
    """What decides a slot's hyperparameters: its group, and whether it decays."""
    return slot.group, slot.parameter.ndim >= 2


def _check(given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], noun: str) -> None:
    """Raise CheckpointError unless names, shapes and dtypes agree."""
    odd = sorted(given.keys() ^ expected.keys())
    if odd:
        side = "holds" if odd[0] in given else "lacks"
        raise CheckpointError(
            f"Checkpoint: the {noun} {side} {odd[0]} ({len(odd)} such names), unlike the run; resume with the lora and "
            "train.trainable settings it was made with."
        )
    for name, tensor in expected.items():
        found = given[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise CheckpointError(
                f"Checkpoint: {name} is {found.dtype} {tuple(found.shape)} where the run has {tensor.dtype} "
                f"{tuple(tensor.shape)}; resume with the lora settings it was made with."
            )
