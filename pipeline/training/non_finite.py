"""Skips optimizer steps that are not finite, and stops a run that has diverged: by such steps, or by its loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from parallel.errors import CheckpointError, LongspanError

MARGIN = 1.0
"""Nats by which a loss must exceed what a uniform guess gives, and the run's first loss, to count as diverged."""


class TrainingDiverged(LongspanError):
    """Too many consecutive steps were not finite, or lost more than a model that guesses."""


class DivergenceGuard:
    """Decides, once an optimizer step, whether the step is applied, and when training has diverged.

    A loss is too high when it exceeds both ln(vocab), which is what a uniform guess over the vocabulary loses, and the
    run's first loss (that of a random or badly stretched model may lie above ln(vocab) by itself) by MARGIN.

    Loss and norm must be the ones already reduced over all ranks: then every rank decides alike without talking.

    Args:
        limit: consecutive bad steps at which training stops, >= 1.
        vocab: rows of the embedding; None: losses are not judged by their height.
    """

    def __init__(self, limit: int, vocab: int | None = None) -> None:
        if limit < 1:
            raise ValueError(f"limit {limit} is not at least 1")
        self.limit, self.vocab = limit, vocab
        self.steps = 0
        """Optimizer steps checked since the run began (also across resumes)."""
        self.skipped = 0
        """Steps skipped since the run began."""
        self.consecutive = 0
        """Bad steps since the last good one: skipped, or of a loss that is too high."""
        self.first_loss: float | None = None
        """Of the first finite step, nats a token."""
        self.high = False
        """The last step's loss was too high."""

    @property
    def ceiling(self) -> float:
        """Highest loss, nats a token, that is not taken for a divergence."""
        if self.vocab is None:
            return math.inf
        return max(math.log(self.vocab), self.first_loss or 0.0) + MARGIN

    @property
    def last_sound_step(self) -> int:
        """Optimizer steps after which a checkpoint is not put in doubt by the bad steps that came last.

        The first of them condemns the very weights it was computed with, those of the step before.
        """
        return self.steps - self.consecutive - 1

    def check(self, loss: float, grad_norm: float) -> bool:
        """Whether to apply the step.

        Args:
            loss: mean loss of the step, nats a token.
            grad_norm: global L2 norm before clipping.

        Raises:
            TrainingDiverged: this is the `limit`-th bad step in a row.
        """
        self.steps += 1
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite and self.first_loss is None:
            self.first_loss = loss
        # Of a mixed row of bad steps the high losses count: they say more of the weights.
        self.high = loss > self.ceiling if finite else (self.high and self.consecutive > 0)
        if finite and not self.high:
            self.consecutive = 0
            return True
        self.skipped += not finite
        self.consecutive += 1
        if self.consecutive >= self.limit:
            raise TrainingDiverged(self._sentence(loss, grad_norm))
        return finite

    def _sentence(self, loss: float, grad_norm: float) -> str:
        begin = f"Training stopped at step {self.steps}: loss {loss:g}"
        if self.high:
            return (
                f"{begin} is above {self.ceiling:.1f}, more than a uniform guess over {self.vocab} tokens or the run's "
                f"first step lost, and {self.consecutive} steps in a row were so or not finite: it has diverged; lower "
                "train.lr."
            )
        return (
            f"{begin} and gradient norm {grad_norm:g} make {self.consecutive} non-finite steps in a row "
            f"({self.skipped} skipped in all); lower train.lr, or check the data."
        )

    def check_end(self) -> None:
        """After the last step of the run.

        Raises:
            TrainingDiverged: its loss was too high, which there are no further steps to confirm.
        """
        if self.high:
            raise TrainingDiverged(
                f"Training ended at step {self.steps} with a loss above {self.ceiling:.1f}, more than a uniform guess "
                f"over {self.vocab} tokens or the run's first step lost: it has diverged; lower train.lr."
            )

    def check_evaluation(self, nll: Mapping[int, float]) -> None:
        """After an evaluation of the trained weights.

        Args:
            nll: mean negative log-likelihood, nats, by context length, of lengths the model is made for.

        Raises:
            TrainingDiverged: all of them are too high or none is a number.
        """
        if nll and not any(value <= self.ceiling for value in nll.values()):
            self.high = True
            losses = ", ".join(f"{length}: {value:g}" for length, value in nll.items())
            raise TrainingDiverged(
                f"The weights of step {self.steps} lose {losses} nats a token on the evaluation text, above "
                f"{self.ceiling:.1f}, more than a uniform guess over {self.vocab} tokens or the run's first step lost: "
                "training has diverged; lower train.lr."
            )

    def state_dict(self) -> dict[str, Any]:
        """Counters and the first loss, for the checkpoint's manifest."""
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "consecutive": self.consecutive,
            "first_loss": self.first_loss,
            "high": self.high,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters; earlier releases kept no losses.

        Raises:
            CheckpointError: a counter is missing or is not a count.
        """
        counts, (first, high) = ("steps", "skipped", "consecutive"), (state.get("first_loss"), state.get("high", False))
        good = (
            {*counts} <= state.keys() <= self.state_dict().keys()
            and all(type(state[name]) is int and state[name] >= 0 for name in counts)
            and (first is None or (type(first) in (int, float) and math.isfinite(first)))
            and type(high) is bool
        )
        if not good:
            raise CheckpointError(
                f"Checkpoint: the guard's state {dict(state)} is not three counts named {', '.join(counts)} and "
                "losses; resume from another checkpoint."
            )
        self.steps, self.skipped, self.consecutive = (state[name] for name in counts)
        self.first_loss, self.high = first, high
