"""Gradients of what trains in one flat fp32 buffer: summed over micro-batches, replicas, other groups, and measured.

bf16 keeps 8 significant bits, so a sum of micro-batch gradients in it loses terms. Each parameter's gradient is added
to its span of the buffer as autograd produces it, and `parameter.grad` is freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch.nn import Parameter

from parallel.axes.data import FlatShards, GradientReducer
from parallel.world.collectives import sum_over

ALIGN_ELEMENTS = 64
"""Every parameter's span of the flat buffer starts at a multiple of this (256 bytes), for vectorized kernels."""
SUMMED_ALIKE = 1 << 16
"""Elements whose squares a CPU may sum in one go. torch keeps a few running sums in fp32 there: the norm of an
embedding of 268 million came out 4% too small, and another one on each grid."""


def _taker(reducer: GradientReducer | None, index: int) -> Callable[[torch.Tensor], None]:
    """A post-accumulate hook that adds a fresh gradient to the fp32 sum and frees it.

    A parameter's hooks are out of the garbage collector's sight: one that led back to the parameter would keep it, and
    with it the model, for ever.
    """

    def take(parameter: torch.Tensor) -> None:
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None
        if reducer is not None:
            reducer.ready(index)

    return take


def _total_norm(views: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp32 scalar: L2 norm over all elements."""
    if views and views[0].device.type == "cpu":
        views = [piece for view in views for piece in view.reshape(-1).split(SUMMED_ALIKE)]
    return torch.nn.utils.get_total_norm(views)


class FlatGradients:
    """The flat fp32 gradient buffer of some parameters.

    From construction on, a backward leaves every `parameter.grad` None and adds to `parameter.main_grad` (fp32, the
    parameter's shape, a view of the buffer) instead.

    Args:
        parameters: in model order, all on one device.
        group: data-parallel replicas (dp x cp) whose gradients are summed; None or one rank: nothing is.
        bucket_elements: gradients summed by one collective, see `GradientReducer`.
    """

    def __init__(self, parameters: Sequence[Parameter], group: dist.ProcessGroup | None, bucket_elements: int) -> None:
        self.parameters = list(parameters)
        spans, end = [], 0
        for parameter in self.parameters:
            spans.append((end, end + parameter.numel()))
            end += -(-parameter.numel() // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
        alone = group is None or dist.get_world_size(group) == 1
        self.shards = FlatShards(spans, None if alone else group, ALIGN_ELEMENTS)
        self.flat = torch.zeros(self.shards.elements, dtype=torch.float32, device=self.parameters[0].device)
        self.reducer = None if alone or group is None else GradientReducer(self.flat, spans, group, bucket_elements)
        self._index = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        self._summed: set[str] = set()
        self.views = []
        for index, ((start, stop), parameter) in enumerate(zip(spans, self.parameters, strict=True)):
            view = self.flat[start:stop].view(parameter.shape)
            parameter.main_grad = view  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(_taker(self.reducer, index))
            self.views.append(view)

    def own_slice(self) -> torch.Tensor:
        """The part of the buffer, 1-D, whose optimizer state this rank keeps."""
        start = self.shards.rank * self.shards.share
        return self.flat[start : start + self.shards.share]

    def zero(self) -> None:
        """Forget the gradients and begin a step."""
        if self.reducer is not None:
            self.reducer.reset()
        self._summed.clear()
        self.flat.zero_()
        for parameter in self.parameters:
            parameter.grad = None

    def arm(self, parameters: Iterable[Parameter] | None) -> None:
        """See `GradientReducer.arm`; nothing when alone.

        Raises:
            RuntimeError: a parameter is not one of these, or see there.
        """
        if self.reducer is None:
            return
        indices = None
        if parameters is not None:
            try:
                indices = [self._index[id(parameter)] for parameter in parameters]
            except KeyError:
                raise RuntimeError("a parameter to be armed is not one that trains here") from None
        self.reducer.arm(indices)

    def finish(self) -> None:
        """Complete the sum over the replicas; see `GradientReducer.finish`; nothing when alone."""
        if self.reducer is not None:
            self.reducer.finish()

    def require_sums(self) -> None:
        """Raise RuntimeError while the buffer holds this replica's gradients only."""
        if self.reducer is not None and not self.reducer.finished:
            raise RuntimeError("gradients are not summed over the data-parallel ranks: call reduce_gradients() first")

    def sum_marked(self, attribute: str, group: dist.ProcessGroup) -> int:
        """Sum the gradients of parameters whose `attribute` is true over another group, in one collective.

        Every rank of `group` must have marked the same shapes in the same order.

        Returns:
            Gradient elements summed.

        Raises:
            RuntimeError: before the sum over the replicas, or twice in a step.
        """
        self.require_sums()
        if attribute in self._summed:
            raise RuntimeError(f"gradients marked {attribute} are already summed in this step")
        self._summed.add(attribute)
        pairs = zip(self.parameters, self.views, strict=True)
        marked = [view.view(-1) for parameter, view in pairs if getattr(parameter, attribute, False)]
        if not marked or dist.get_world_size(group) == 1:
            return sum(view.numel() for view in marked)
        if len(marked) == 1:  # the tied embedding: too large to be copied for nothing
            sum_over(group, marked[0])
            return marked[0].numel()
        packed = sum_over(group, torch.cat(marked))
        for view, values in zip(marked, packed.split([view.numel() for view in marked]), strict=True):
            view.copy_(values)
        return packed.numel()

    def keep_own_norms(self) -> None:
        """From the next step on, know `own_norm`."""
        if self.reducer is not None:
            self.reducer.norms = []

    def own_norm(self) -> torch.Tensor:
        """fp32 scalar: L2 norm of this rank's gradients of the step before the sum over the replicas.

        Alone there is no such sum, and it is the norm of the buffer as it is.

        Raises:
            RuntimeError: they are not kept, or not all known yet.
        """
        if self.reducer is None:
            return torch.linalg.vector_norm(self.flat)
        if not self.reducer.norms or not self.reducer.finished:
            raise RuntimeError("a rank's own gradients are known after keep_own_norms() and the sums over the ranks")
        return torch.linalg.vector_norm(torch.stack(self.reducer.norms))

    def norm(self, reduce: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
        """See `TrainableAdamW.grad_norm`."""
        self.require_sums()
        replicated: list[torch.Tensor] = []
        sharded: list[torch.Tensor] = []
        for parameter, view in zip(self.parameters, self.views, strict=True):
            if not getattr(parameter, "shared_copy", False):
                (sharded if getattr(parameter, "tensor_model_parallel", False) else replicated).append(view)
        norms = [_total_norm(part).to(self.flat.device) for part in (replicated, sharded)]
        if reduce is None and not sharded:
            return norms[0]
        squares = torch.stack(norms).double().square()
        if reduce is not None:
            squares = reduce(squares)
        return squares.sum().sqrt().float()
