"""Skips optimizer steps whose loss or gradients are not finite, and stops a run that keeps producing them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from parallel.errors import CheckpointError, LongspanError


class TrainingDiverged(LongspanError):
    """Too many consecutive steps had a loss or gradient norm that is not finite."""


class NonFiniteGuard:
    """Decides, once an optimizer step, whether the step is applied.

    Loss and norm must be the ones already reduced over all ranks: then every rank decides alike without talking.

    Args:
        limit: consecutive bad steps at which training stops, >= 1.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit {limit} is not at least 1")
        self.limit = limit
        self.steps = 0
        """Optimizer steps checked since the run began (also across resumes)."""
        self.skipped = 0
        """Steps skipped since the run began."""
        self.consecutive = 0
        """Steps skipped since the last good one."""

    def check(self, loss: float, grad_norm: float) -> bool:
        """Whether to apply the step.

        Args:
            loss: mean loss of the step, nats a token.
            grad_norm: global L2 norm before clipping.

        Raises:
            TrainingDiverged: this is the `limit`-th bad step in a row.
        """
        self.steps += 1
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.consecutive = 0
            return True
        self.skipped += 1
        self.consecutive += 1
        if self.consecutive >= self.limit:
            raise TrainingDiverged(
                f"Training stopped at step {self.steps}: loss {loss:g} and gradient norm {grad_norm:g} make "
                f"{self.consecutive} non-finite steps in a row ({self.skipped} skipped in all); lower train.lr, or "
                "check the data, and rerun to resume from the last checkpoint."
            )
        return False

    def state_dict(self) -> dict[str, int]:
        """Counters, for the checkpoint's manifest."""
        return {"steps": self.steps, "skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the counters.

        Raises:
            CheckpointError: a counter is missing or is not a count.
        """
        expected = self.state_dict()
        good = state.keys() == expected.keys() and all(
            isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in state.values()
        )
        if not good:
            raise CheckpointError(
                f"Checkpoint: the guard's state {dict(state)} is not three counts named {', '.join(expected)}; resume "
                "from another checkpoint."
            )
        self.steps, self.skipped, self.consecutive = state["steps"], state["skipped"], state["consecutive"]
