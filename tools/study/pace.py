"""Recipes at equal seconds: each is timed shortly, and takes as many steps as fit into its budget. No torch.

Seconds are those of optimizer steps, without loading, evaluation and saving. The steps that come of a timing are kept,
and the run is one of so many steps from then on: it can be repeated, and goes on, on a machine of another speed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from parallel.errors import ConfigError, DataError
from pipeline.config.run import RunConfig
from pipeline.storage.json_file import replace_json

WARM, TIMED = 3, 5
"""Steps that are taken and not counted, since kernels are chosen and compiled in them, and steps that are."""


@dataclass(frozen=True)
class Pace:
    """How fast a recipe trains."""

    step_seconds: float
    """Of one optimizer step: the medians of its two attentions, in the recipe's proportion."""
    device: str
    """Where it was timed."""

    def steps_in(self, seconds: float) -> int:
        """Steps that come nearest to a budget, one at least."""
        return max(1, round(seconds / self.step_seconds))

    def write(self, path: Path) -> None:
        """Keep it.

        Raises:
            DataError: the file cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_json(path, asdict(self))
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror or error}); free space there.") from None

    @classmethod
    def read(cls, path: Path) -> Pace | None:
        """What was kept; None: nothing.

        Raises:
            DataError: the file is none of these.
        """
        try:
            data = json.loads(path.read_text())
            found = cls(float(data["step_seconds"]), str(data["device"]))
            if not found.step_seconds > 0:
                raise ValueError("a step takes time")
            return found
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: is no pace of a recipe ({error}); move it away, and rerun.") from None


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The run with another number of steps: warm-up and the last steps in full attention keep their share."""
    share = steps / config.train.steps
    train = replace(config.train, steps=steps, warmup_steps=round(config.train.warmup_steps * share))
    last = min(steps, round(config.attention.full_last_steps * share))
    return replace(config, train=train, attention=replace(config.attention, full_last_steps=last))


def timing_run(config: RunConfig, output: Path) -> RunConfig:
    """A short run of a recipe: of each of its attentions, steps to warm up and steps to time."""
    part = WARM + TIMED
    full = config.attention.full_last_steps
    both = 0 < full < config.train.steps
    train = replace(config.train, steps=part * (1 + both), warmup_steps=1)
    last = part if both else min(full, part)
    return replace(config, train=train, attention=replace(config.attention, full_last_steps=last), output=str(output))


def pace_of(config: RunConfig, seconds: Sequence[float], device: str) -> Pace:
    """What a timing run says of a recipe.

    Args:
        config: of the recipe, not of the timing run.
        seconds: of each step of the timing run.
    """
    part = WARM + TIMED
    medians = [statistics.median(seconds[at + WARM : at + part]) for at in range(0, len(seconds), part)]
    full = config.attention.full_last_steps / config.train.steps
    step = medians[0] if len(medians) == 1 else (1 - full) * medians[0] + full * medians[1]
    return Pace(step, device)


def is_positive(value: object) -> bool:
    """Whether it is a number above 0, and no infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def check_budget(where: str, seconds: float | None, seconds_of: str | None, untrained: bool) -> None:
    """Refuse a budget that means nothing.

    Raises:
        ConfigError: one sentence.
    """
    if seconds is not None and not is_positive(seconds):
        raise ConfigError(f"{where}.seconds: {seconds!r} is no time; give seconds of training, e.g. 40.")
    if seconds is not None and seconds_of is not None:
        raise ConfigError(f"{where}: seconds and seconds_of are two budgets; remove one.")
    if untrained and (seconds is not None or seconds_of is not None):
        raise ConfigError(f"{where}: is untrained and takes no time; remove seconds and seconds_of.")
