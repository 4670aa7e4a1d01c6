"""How a frozen matrix is kept, and the two products that are ever made with it.

A frozen [O, I] matrix is multiplied with activations in the forward pass and with gradients in the backward pass; it
has no gradient of its own. Linears, the MLP, loading, ZeRO-3 units and hashing speak to a `FrozenWeight`, so that
another form (8 or 4 bits: `quantized_weight`) is another class and nothing else.

Shapes: O output width, I input width, n rows, R rows of the matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import Parameter

from pipeline.model.layers.swiglu import swiglu, swiglu_gradient_


class FrozenWeight(ABC):
    """A frozen matrix [O, I] in one form."""

    form: str
    """Name of the form, as manifests and reports spell it."""

    rounds = False
    """Activations and gradients are rounded before they are multiplied: SwiGLU's are better made so at once."""
    whole_rows = False
    """`encode` and `write` are given whole rows of the checkpoint's matrix, also where tensor parallelism leaves this
    rank some of its columns: what the rows are rounded to does not depend on how they are cut."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """[O, I]; of a matrix that engine zero3 has not gathered, empty."""

    @property
    def given_shape(self) -> torch.Size:
        """Of what `write` is given: [O, I], with `whole_rows` [O, columns of the checkpoint's matrix]."""
        return self.shape

    def at_hand(self, dtype: torch.dtype) -> FrozenWeight:
        """The same for several products one after the other with rows of `dtype`: what each of them would make of the
        matrix first is made once, and let go of with the result."""
        return self

    @abstractmethod
    def members(self) -> Mapping[str, Parameter]:
        """The tensors it consists of, by name: what is allocated, sharded, gathered, offloaded and hashed.

        Each has O rows, and its rows depend on the same rows of the matrix alone: any stretch of rows can be made from
        those rows of the checkpoint. The first is called "weight".
        """

    @abstractmethod
    def encode(self, rows_RI: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The rows of every member for rows of the matrix, of any float dtype."""

    @torch.no_grad()
    def write(self, whole_OI: torch.Tensor) -> None:
        """Set the whole matrix from a checkpoint's, of any float dtype."""
        members = self.members()
        for name, rows in self.encode(whole_OI).items():
            members[name].copy_(rows)

    @abstractmethod
    def product(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T: [..., I] -> [..., O], into `out` if given, which may be a strided view of three dimensions."""

    @abstractmethod
    def grad_input(self, grads: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """g W: [..., O] -> [..., I], into `out` if given, which may be a strided view of three dimensions."""

    def swiglu(self, gate_up: torch.Tensor, fused: bool = True) -> Any:
        """silu(gate) * up of [..., 2 I], as `product` takes it.

        Args:
            fused: use kernels.
        """
        return swiglu(gate_up, fused)

    def swiglu_gradient(self, gate_up: torch.Tensor, grads: torch.Tensor, fused: bool = True) -> Any:
        """The gradient of gate and up [..., O], given that of their product [..., O / 2], as `grad_input` takes it.

        Args:
            gate_up: contiguous; overwritten.
            grads: contiguous.
            fused: use kernels.
        """
        swiglu_gradient_(gate_up, grads, gate_up, fused)
        return gate_up


class DenseWeight(FrozenWeight):
    """The matrix as it is, in the model's dtype.

    Args:
        parameter: the matrix. Read anew at every product: engine zero3 changes where it lies.
    """

    form = "dense"

    def __init__(self, parameter: Parameter) -> None:
        self.parameter = parameter

    @property
    def shape(self) -> torch.Size:
        """See `FrozenWeight.shape`."""
        return self.parameter.shape

    def members(self) -> Mapping[str, Parameter]:
        """One: the matrix."""
        return {"weight": self.parameter}

    def encode(self, rows_RI: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """As they are; whoever copies them casts."""
        return {"weight": rows_RI}

    def product(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `FrozenWeight.product`."""
        return times(rows, self.parameter.detach().t(), out)

    def grad_input(self, grads: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `FrozenWeight.grad_input`."""
        return times(grads, self.parameter.detach(), out)


def times(rows: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """[..., I] times [I, O]. A strided `out` [T, l, O] takes a batched product of equal parts."""
    width = matrix.shape[1]
    if out is not None and not out.is_contiguous():
        torch.bmm(rows.reshape(*out.shape[:2], rows.shape[-1]), matrix.expand(out.shape[0], *matrix.shape), out=out)
        return out
    if rows.ndim == 3 and not rows.is_contiguous():
        # A view of every rank's tokens [T, l, I]: flattened it would be copied.
        return torch.bmm(rows, matrix.expand(rows.shape[0], *matrix.shape))
    # Flattened, since matmul does not fold a batch of one.
    flat = rows.reshape(-1, rows.shape[-1])
    if out is not None:
        torch.mm(flat, matrix, out=out.view(-1, width))
        return out
    return torch.mm(flat, matrix).view(*rows.shape[:-1], width)


KEPT = "kept"
"""Attribute of a linear whose matrix is not dense: makes the `FrozenWeight` of the parameters it has now."""


def kept_by(linear: torch.nn.Module) -> FrozenWeight:
    """The matrix of a parallel linear, in the form it is kept in."""
    kept: Callable[[torch.nn.Module], FrozenWeight] | None = getattr(linear, KEPT, None)
    if kept is not None:
        return kept(linear)
    weight = linear.weight
    assert isinstance(weight, Parameter)
    return DenseWeight(weight)


def frozen_weight(linear: torch.nn.Module) -> FrozenWeight | None:
    """The matrix of a parallel linear; None if it trains."""
    trains: bool = linear.weight.requires_grad  # type: ignore[assignment]
    return None if trains else kept_by(linear)
