"""What RULER found: a result a task and length, one report a model, and the effective length."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from parallel.errors import DataError
from pipeline.evaluation.kept import VERSION, KeptResults, ModelReport
from pipeline.evaluation.ruler.tasks import RulerCell, RulerSettings
from pipeline.reporting.lasting import Warn
from pipeline.storage.json_file import replace_json

PAPER = 0.856
"""RULER's threshold (arXiv 2404.06654): what Llama-2-7B scores at 4k."""
PAPER_SAYS = "RULER's threshold"
"""Whose threshold it is where no base says."""


@dataclass(frozen=True)
class RulerResult:
    """How a model did in one task at one length."""

    task: str
    length: int
    """Tokens of a prompt and what is written after it, at most."""
    scores: tuple[float, ...]
    """Of each prompt, the share of its answers that was written."""
    written: tuple[str, ...]
    """After each prompt, until all answers were there."""

    @property
    def place(self) -> tuple[int, str]:
        """See `Kept`."""
        return self.length, self.task

    @property
    def score(self) -> float:
        """Mean over the prompts."""
        return sum(self.scores) / len(self.scores)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        facts = {"task": self.task, "length": self.length, "score": self.score}
        return {**facts, "scores": list(self.scores), "written": list(self.written)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RulerResult:
        """The inverse of `to_json`; KeyError, TypeError or ValueError where it is none."""
        scores, written = tuple(float(score) for score in data["scores"]), tuple(map(str, data["written"]))
        if not scores or len(scores) != len(written):
            raise ValueError("as many scores as replies, one at least")
        return cls(str(data["task"]), int(data["length"]), scores, written)


class RulerFile(KeptResults[RulerResult]):
    """Results by key, see `KeptResults`."""

    kind = RulerResult
    called = "RULER results"


def ruler_key(model: Mapping[str, Any], cell: RulerCell) -> str:
    """Hash of all that decides a result: the model's identity, the prompts token by token, and what is wanted."""
    digest = hashlib.sha256(json.dumps([VERSION, cell.task, cell.length, model], sort_keys=True).encode())
    for sample, ids in zip(cell.samples, cell.prompts, strict=True):
        digest.update(json.dumps([sample.answers, sample.new, len(ids)]).encode())
        digest.update(np.array(ids, dtype="<i8").tobytes())
    return digest.hexdigest()


def means(cells: Sequence[RulerResult]) -> dict[int, float]:
    """By length, the mean over its tasks, each of equal weight."""
    found: dict[int, list[float]] = {}
    for cell in cells:
        found.setdefault(cell.length, []).append(cell.score)
    return {length: sum(scores) / len(scores) for length, scores in sorted(found.items())}


def _judged(cells: Sequence[RulerResult]) -> dict[int, float]:
    """`means` at the lengths where the most tasks were asked: one over fewer tasks is no measure beside them."""
    tasks = Counter(cell.length for cell in cells)
    return means([cell for cell in cells if tasks[cell.length] == max(tasks.values())])


def effective_length(scores: Mapping[int, float], threshold: float) -> int:
    """The longest length up to which every score is at least `threshold`, as RULER (arXiv 2404.06654) reads its table.

    Args:
        scores: by length.

    Returns:
        0: not even the shortest.
    """
    longest = 0
    for length in sorted(scores):
        if not scores[length] >= threshold or math.isnan(scores[length]):
            break
        longest = length
    return longest


@dataclass(frozen=True)
class Effective:
    """An effective length, and what it was judged by."""

    tokens: int
    """0: not even the shortest length measured."""
    threshold: float
    """Mean score that every length up to it reaches."""
    tasks: tuple[str, ...]
    """Over which the mean is."""
    criterion: str
    """Whose threshold it is."""

    @property
    def sentence(self) -> str:
        """For the user."""
        of = f"{len(self.tasks)} task{'s' if len(self.tasks) > 1 else ''}"
        return f"effective length {self.tokens} tokens: {self.threshold:.1%} or more over {of} ({self.criterion})"

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        facts = {"tokens": self.tokens, "threshold": self.threshold}
        return {**facts, "tasks": list(self.tasks), "criterion": self.criterion}


@dataclass(frozen=True)
class RulerReport(ModelReport[RulerResult]):
    """What one model answers."""

    kind = RulerResult
    otherwise = "is no RULER report"

    def answers(self, asked: RulerSettings, text: str) -> bool:
        """Whether it tells of each of these tasks and lengths, by as many prompts or more.

        Args:
            text: fingerprint of the held-out tokens.
        """
        found = {cell.place: len(cell.scores) for cell in self.cells}
        alike = asked.seed == self.seed and self.text in (None, text)
        return alike and all(found.get((n, task), 0) >= asked.trials for task in asked.tasks for n in asked.lengths)

    def effective(self, base: RulerReport | None) -> Effective:
        """The effective length: by the base's score at its own length, or without that, by RULER's threshold.

        Args:
            base: as shipped. Tasks of which it does nothing at its own length are left out. Its own length is the
                longest measured one within its context.
        """
        tasks = tuple(dict.fromkeys(cell.task for cell in self.cells))
        if base is not None:
            own = max((cell.length for cell in base.cells if cell.length <= base.base_context), default=0)
            can = {cell.task: cell.score for cell in base.cells if cell.length == own and cell.score > 0}
            shared = tuple(task for task in tasks if task in can)
            if shared:
                threshold = sum(can[task] for task in shared) / len(shared)
                mine = _judged([cell for cell in self.cells if cell.task in shared])
                # A mean of the same scores must reach itself.
                reached = effective_length(mine, threshold - 1e-9)
                return Effective(reached, threshold, shared, f"the base's own score at {own} tokens")
        return Effective(effective_length(_judged(self.cells), PAPER), PAPER, tasks, PAPER_SAYS)

    def write(self, path: Path, base: RulerReport | None = None) -> None:
        """Write as JSON, in one step; OSError if the disk refuses.

        Args:
            base: see `effective`.
        """
        replace_json(path, {**self.to_json(), "effective_length": self.effective(base).to_json()})


def fell_short(mine: RulerReport, base: RulerReport, whose: str) -> list[str]:
    """What a model lost of RULER at lengths that the base serves, in words; none: nothing.

    Args:
        base: as shipped, or what the model began with.
        whose: the base, for the sentences.
    """
    tasks = {cell.task for cell in mine.cells}
    shared = replace(base, cells=tuple(cell for cell in base.cells if cell.task in tasks))
    theirs, own = shared.effective(shared), mine.effective(shared)
    if theirs.criterion == PAPER_SAYS:
        return [f"RULER: {whose} does none of its tasks at its own length: nothing to lose or win."]
    if own.tokens >= theirs.tokens:
        return []
    scores = _judged([cell for cell in mine.cells if cell.task in own.tasks])
    first = next((length for length in scores if length > own.tokens), None)
    there = "" if first is None else f": at {first} it scores {scores[first]:.0%}"
    return [
        f"RULER's effective length fell from {theirs.tokens} tokens, {whose}'s, to {own.tokens}{there} where "
        f"{own.threshold:.0%} over {len(own.tasks)} task{'s' if len(own.tasks) > 1 else ''} is wanted "
        f"({own.criterion})."
    ]


def ruler_path(output: Path, label: str) -> Path:
    """Where the report of a label lies."""
    return output / f"ruler-{label}.json"


def shipped_ruler(output: Path, warn: Warn = lambda sentence: None) -> RulerReport | None:
    """What the base as shipped was found to do; None: it was not measured, or the file is damaged.

    Args:
        output: the run's folder.
        warn: told of a damaged file.
    """
    path = ruler_path(output, "shipped")
    try:
        return RulerReport.read(path) if path.exists() else None
    except DataError as error:
        warn(f"{error} Until then the effective length is judged by {PAPER_SAYS}.")
        return None
