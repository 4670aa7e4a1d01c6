"""How a tensor was made, from others that are kept anyway: whoever wants it in the backward need not keep it.

A norm keeps its input, so that its output costs one pass over memory to make again; SwiGLU keeps gate and up; attention
keeps what its kernels returned, of which its output by tokens is a rearrangement. The recipe travels with the tensor as
an attribute, and only with that very tensor: what is computed from it has none. megatron's layer stands between who
makes a tensor and who takes it, so that no argument reaches; and kept anywhere else, a recipe would outlive its tensor,
and hold the sources' memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Make = Callable[[Sequence[torch.Tensor], int, int], torch.Tensor]
"""(sources, start, stop) -> tokens [start, stop) of the tensor, to the bit."""


@dataclass(frozen=True)
class Recipe:
    """Sources without gradients, and what makes the tensor of them; an autograd function saves the one and keeps the
    other, so that autograd sees when a source was changed."""

    sources: tuple[torch.Tensor, ...]
    make: Make

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Tokens [start, stop)."""
        return self.make(self.sources, start, stop)


def give_recipe(output: torch.Tensor, recipe: Recipe | None) -> None:
    """Note how a tensor was made; None: nobody knows."""
    output.recipe = recipe  # type: ignore[attr-defined]


def recipe_of(output: torch.Tensor) -> Recipe | None:
    """How a tensor was made; None: nobody said."""
    return getattr(output, "recipe", None)
