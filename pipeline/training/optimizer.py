"""AdamW on what trains, and only on that: fp32 masters and moments, nothing at all for frozen weights.

bf16 keeps 8 significant bits, so a weight moved by a small learning rate may not live in it: it never moves. Updates
happen on fp32 masters; a parameter that is fp32 already is its own master. Data-parallel replicas keep one slice of
masters and moments each and exchange the updated weights (ZeRO stage 1, arXiv 1910.02054).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import Parameter
from torch.optim.adamw import adamw

from parallel.axes.data import Piece
from pipeline.training.gradients import FlatGradients

BUCKET_ELEMENTS = 1 << 26
"""Gradient elements (fp32: 256 MiB) reduced by one collective, and weights gathered by one."""

STEP = "step"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Trained:
    """One trained parameter."""

    name: str
    group: str
    parameter: Parameter

    @property
    def kind(self) -> tuple[str, bool]:
        """What decides its hyperparameters: its group, and whether it decays."""
        return self.group, self.parameter.ndim >= 2


@dataclass(frozen=True)
class _Slot:
    """This rank's piece of a trained parameter and what belongs to it: fp32, 1-D, or the parameter's shape if whole."""

    trained: _Trained
    piece: Piece
    master: torch.Tensor
    """Shares the parameter's memory when that is fp32, unless the state is offloaded."""
    gradient: torch.Tensor
    """View of the flat buffer."""
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    steps: torch.Tensor
    """fp32 scalar on the parameter's device: torch's kernels advance it. One each, since they write to it."""

    offloaded: bool
    """Master and moments are in host memory, where the update is computed."""

    @property
    def has_copy(self) -> bool:
        return self.offloaded or self.master.dtype != self.trained.parameter.dtype


class TrainableAdamW:
    """AdamW (arXiv 1711.05101) with fp32 state for parameters of any float dtype.

    From construction on, each parameter's gradient is added to its slice of one flat fp32 buffer
    (`parameter.main_grad`) as soon as autograd has it, and `parameter.grad` is freed: after a backward it is None.

    With a `group` of several ranks a step is: `zero_grad`; backwards; before the last one `arm_reduce`, so that sums
    travel while it runs; `reduce_gradients`; `grad_norm`; `step`. With one rank the two reduce calls do nothing.

    Args:
        named_parameters: (canonical name, learning-rate group, parameter) in model order, all on one device and
            requiring gradients.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled, applied to matrices (two dimensions or more) only.
        clip: global L2 norm to clip to; 0 switches clipping off.
        group: data-parallel replicas (dp x cp), with the same parameters and values on every rank.
        bucket_elements: gradient elements summed by one collective; None: BUCKET_ELEMENTS.
        offload: keep masters and moments in host memory and update them there (ZeRO-Offload, arXiv 2101.06840); an
            update then moves this rank's slice of the gradients down and of the weights up.

    Raises:
        ValueError: nothing to train, a frozen parameter, a name or parameter given twice, or, with several ranks, a
            parameter that is not contiguous.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, str, Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        group: dist.ProcessGroup | None = None,
        bucket_elements: int | None = None,
        offload: bool = False,
    ) -> None:
        self._offload = offload
        self.betas, self.eps, self.weight_decay, self.clip = betas, eps, weight_decay, clip
        given = [_Trained(*row) for row in named_parameters]
        if not given:
            raise ValueError("no parameter to train")
        if len({one.name for one in given}) < len(given) or len({id(one.parameter) for one in given}) < len(given):
            raise ValueError("a name or a parameter is given twice")
        frozen = [one.name for one in given if not one.parameter.requires_grad]
        if frozen:
            raise ValueError(f"{frozen[0]} does not require a gradient")
        self._trained, self._bucket_elements = given, bucket_elements or BUCKET_ELEMENTS
        self._gradients = FlatGradients([one.parameter for one in given], group, self._bucket_elements)
        self._shards = self._gradients.shards
        self._sharded = self._shards.size > 1
        strided = [one.name for one in given if self._sharded and not one.parameter.is_contiguous()]
        if strided:
            raise ValueError(f"{strided[0]} is not contiguous")
        self._slots = [self._make_slot(piece) for piece in self._shards.own()]
        self._done = 0

    def _make_slot(self, piece: Piece) -> _Slot:
        """Allocate the state of one piece."""
        trained = self._trained[piece.index]
        data, gradient = trained.parameter.detach(), self._gradients.views[piece.index]
        if self._sharded:
            data, gradient = (tensor.view(-1)[piece.start : piece.stop] for tensor in (data, gradient))
        home = torch.device("cpu") if self._offload else data.device
        master = data.to(home, torch.float32, copy=self._offload)
        first, second = (torch.zeros_like(master) for _ in MOMENTS)
        steps = torch.zeros((), dtype=torch.float32, device=home)
        return _Slot(trained, piece, master, gradient, first, second, steps, self._offload)

    def zero_grad(self) -> None:
        """Forget the gradients summed so far and begin a step.

        Raises:
            RuntimeError: sums over the ranks were started and not finished.
        """
        self._gradients.zero()

    def arm_reduce(self, parameters: Iterable[Parameter] | None = None) -> None:
        """Before the last micro-batch's backward: sums over the replicas may start as its gradients arrive.

        Args:
            parameters: those whose last backward comes next (a model chunk under an interleaved schedule); None: all.
                A parameter that gets several gradients in one backward must not be armed.

        Raises:
            RuntimeError: armed twice, after the sums, or a parameter that does not train here.
        """
        self._gradients.arm(parameters)

    def reduce_gradients(self) -> None:
        """Complete the sum over the replicas, armed or not; collective.

        Raises:
            RuntimeError: called twice in a step.
        """
        self._gradients.finish()

    def sum_marked(self, attribute: str, group: dist.ProcessGroup) -> int:
        """Sum the gradients of parameters with a true `attribute` over another group, after `reduce_gradients`.

        For `sequence_parallel` over the tensor-parallel group, and the tied embedding over first and last stage.
        Collective, at most one call each; returns the elements summed.

        Raises:
            RuntimeError: before `reduce_gradients`, or twice in a step.
        """
        return self._gradients.sum_marked(attribute, group)

    def keep_own_norms(self) -> None:
        """From the next step on, know `own_norm`: one more reading of the gradients."""
        self._gradients.keep_own_norms()

    def own_norm(self) -> torch.Tensor:
        """See `FlatGradients.own_norm`."""
        return self._gradients.own_norm()

    def grad_norm(self, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """Global L2 norm of the summed gradients: fp32 scalar, before clipping.

        Parameters with `shared_copy` set (the last stage's copy of tied embeddings) are counted elsewhere, not here.

        Args:
            reduce: for model parallelism; gets the squared sums, fp64 [2], of (parameters alike on all tensor-parallel
                ranks, parameters with `tensor_model_parallel` set) and returns them as the whole model has them: both
                summed over pipeline stages, the second over tensor-parallel ranks too. Gradients of
                `sequence_parallel` parameters must have been summed before (`sum_marked`), which makes them alike.

        Raises:
            RuntimeError: before `reduce_gradients`.
        """
        return self._gradients.norm(reduce)

    @torch.no_grad()
    def step(self, rates: Mapping[str, float], norm: float) -> None:
        """Clip the summed gradients of this rank's slice in place, update its masters, and renew all parameters.

        Collective when sharded.

        Args:
            rates: learning rate of every group.
            norm: what `grad_norm` gave; gradients are scaled by min(1, clip / (norm + 1e-6)), as
                `torch.nn.utils.clip_grad_norm_` does.

        Raises:
            KeyError: a group has no rate.
            RuntimeError: before `reduce_gradients`.
        """
        self._gradients.require_sums()
        # Looked up for all parameters, not this rank's: an error must be everyone's, or the others would wait.
        settings = {one.kind: rates[one.group] for one in self._trained}
        scale = self.clip / (norm + 1e-6) if self.clip > 0 else 1.0
        if scale < 1.0:
            self._gradients.own_slice().mul_(scale)
        for kind in sorted(settings):
            chosen = [slot for slot in self._slots if slot.trained.kind == kind]
            if not chosen:
                continue
            adamw(
                [slot.master for slot in chosen],
                [slot.gradient.to(slot.master.device) for slot in chosen],
                [slot.exp_avg for slot in chosen],
                [slot.exp_avg_sq for slot in chosen],
                [],
                [slot.steps for slot in chosen],
                # One pass over memory, on CPU too, where it is as deterministic as the loop of ten passes.
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=settings[kind],
                weight_decay=self.weight_decay if kind[1] else 0.0,
                eps=self.eps,
                maximize=False,
            )
        self._done += 1
        self._renew_parameters()

    def _renew_parameters(self) -> None:
        """Copy the masters into the parameters, rounded to their dtype."""
        if not self._sharded:
            for slot in self._slots:
                if slot.has_copy:
                    slot.trained.parameter.detach().copy_(slot.master)
            return
        dtypes = {one.parameter.dtype for one in self._trained}
        self._shards.gather(
            [slot.master for slot in self._slots],
            [one.parameter.detach().view(-1) for one in self._trained],
            # Rounding before the journey gives the same bits as after it, for half the bytes.
            dtypes.pop() if len(dtypes) == 1 else torch.float32,
            self._gradients.flat.device,
            self._bucket_elements,
        )

    def masters(self, everywhere: bool = True) -> dict[str, torch.Tensor]:
        """fp32 masters by canonical name, each of its parameter's shape.

        Live tensors in one process. When sharded: collective, whole copies in host memory, since a save must not set
        the GPU's peak.

        Args:
            everywhere: False: only the group's first rank gets them, others an empty dict.
        """
        return self._whole("master", "", everywhere)

    def state_dict(self, everywhere: bool = True) -> dict[str, torch.Tensor]:
        """Moments `<name>.exp_avg` and `<name>.exp_avg_sq` (fp32), and `step` (int64 scalar): updates applied.

        Together with `masters` this is everything the next update depends on; same rules as there.
        """
        state: dict[str, torch.Tensor] = {}
        for moment in MOMENTS:
            state |= self._whole(moment, f".{moment}", everywhere)
        if state:
            state[STEP] = torch.tensor(self._done, dtype=torch.int64)
        return state

    def own_moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, this rank's piece) of every moment, live; not collective."""
        for slot in self._slots:
            for moment in MOMENTS:
                yield f"{slot.trained.name}.{moment}", getattr(slot, moment)

    def own_pieces(self) -> Iterator[tuple[str, int, int, dict[str, torch.Tensor]]]:
        """(name, start, stop, state) of what this rank keeps; not collective.

        [start, stop) counts elements of the flattened parameter; state holds `master` and MOMENTS, live, fp32, 1-D.
        """
        for slot in self._slots:
            state = {"master": slot.master} | {moment: getattr(slot, moment) for moment in MOMENTS}
            flat = {field: tensor.reshape(-1) for field, tensor in state.items()}
            yield slot.trained.name, slot.piece.start, slot.piece.stop, flat

    @property
    def updates(self) -> int:
        """Updates applied."""
        return self._done

    @torch.no_grad()
    def load_pieces(self, read: Callable[[str, str, int, int], torch.Tensor], updates: int) -> None:
        """Restore what this rank keeps, bit for bit, and renew all parameters from it; collective when sharded.

        Args:
            read: gives (name, `master` or one of MOMENTS, start, stop) as `own_pieces` counts them: fp32, 1-D.
            updates: see there.
        """
        for slot in self._slots:
            for field in ("master", *MOMENTS):
                target: torch.Tensor = getattr(slot, field)
                target.copy_(read(slot.trained.name, field, slot.piece.start, slot.piece.stop).view(target.shape))
            slot.steps.fill_(updates)
        self._done = updates
        self._renew_parameters()

    def _whole(self, field: str, suffix: str, everywhere: bool) -> dict[str, torch.Tensor]:
        """One field of every slot as tensors of the parameters' shapes."""
        local = [getattr(slot, field) for slot in self._slots]
        if not self._sharded:
            return {f"{slot.trained.name}{suffix}": values for slot, values in zip(self._slots, local, strict=True)}
        wanted = everywhere or self._shards.rank == 0
        whole = [torch.empty(one.parameter.shape, dtype=torch.float32) if wanted else None for one in self._trained]
        self._shards.gather(
            local,
            [None if tensor is None else tensor.view(-1) for tensor in whole],
            torch.float32,
            self._gradients.flat.device,
            self._bucket_elements,
        )
        pairs = zip(self._trained, whole, strict=True)
        return {f"{one.name}{suffix}": tensor for one, tensor in pairs if tensor is not None}
