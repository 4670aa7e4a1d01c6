"""What retrieval found: cell by cell in a JSON file, so that nothing is done twice; one report a model; in words."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.evaluation.kept import VERSION, KeptResults, ModelReport
from pipeline.evaluation.perplexity import EvalReport, exponential
from pipeline.evaluation.tasks import Cell, RetrievalSettings
from pipeline.reporting.metrics import json_number
from pipeline.reporting.words import counted
from pipeline.storage.json_file import replace_json


class Scored(Protocol):
    """How a model did in a task at a length."""

    @property
    def task(self) -> str:
        """Its name."""

    @property
    def length(self) -> int:
        """Tokens of a window."""

    @property
    def scores(self) -> tuple[float, ...]:
        """Of each prompt, in [0, 1]."""


@dataclass(frozen=True)
class CellResult:
    """How a model did in one cell."""

    task: str
    length: int
    """Tokens of a window."""
    depth: float
    scores: tuple[float, ...]
    """Of each prompt, in [0, 1]: 1 where greedy decoding gives the answer exactly."""
    nll: tuple[float, ...]
    """Of each prompt, the mean over the answer's tokens, nats."""
    begun: tuple[float, ...]
    """Of each prompt: 1 where greedy decoding gives the rest of the answer once its first token is given. Where this is
    much more than `scores`, the model finds the answer and only begins it otherwise."""

    @property
    def place(self) -> tuple[str, int, float]:
        """See `Kept`."""
        return self.task, self.length, self.depth

    @property
    def score(self) -> float:
        """Mean over the prompts."""
        return sum(self.scores) / len(self.scores)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        nll = [json_number(value) for value in self.nll]
        return {**asdict(self), "scores": list(self.scores), "nll": nll, "begun": list(self.begun)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CellResult:
        """The inverse of `to_json`; KeyError, TypeError or ValueError where it is none."""
        scores = tuple(float(value) for value in data["scores"])
        nll = tuple(math.nan if value is None else float(value) for value in data["nll"])
        begun = tuple(float(value) for value in data["begun"])
        if not scores or not len(scores) == len(nll) == len(begun):
            raise ValueError("as many scores as answers, one at least")
        return cls(str(data["task"]), int(data["length"]), float(data["depth"]), scores, nll, begun)


def cell_key(model: Mapping[str, Any], cell: Cell) -> str:
    """Hash of all that decides a cell's result: the model's identity and the prompts token by token.

    Args:
        model: JSON-ready; whatever tells this model from others.
    """
    digest = hashlib.sha256(json.dumps([VERSION, cell.task, model], sort_keys=True).encode())
    for case in cell.cases:
        digest.update(np.array([case.answer, len(case.tokens)], dtype="<i8").tobytes())
        digest.update(case.tokens.astype("<i8").tobytes())
    return digest.hexdigest()


class ResultFile(KeptResults[CellResult]):
    """Results of retrieval by key, see `KeptResults`."""

    kind = CellResult
    called = "retrieval results"


def by_task[Cell: Scored](cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """The cells of each task, in order."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.task, []).append(cell)
    return found


def begun_by_length(cells: Iterable[CellResult]) -> dict[int, tuple[float, int]]:
    """As `by_length`, of answers whose first token is given."""
    return by_length(replace(cell, scores=cell.begun) for cell in cells)


def by_length(cells: Iterable[Scored]) -> dict[int, tuple[float, int]]:
    """Mean score and prompts of each length, over all its cells."""
    scores: dict[int, list[float]] = {}
    for cell in cells:
        scores.setdefault(cell.length, []).extend(cell.scores)
    return {length: (sum(found) / len(found), len(found)) for length, found in sorted(scores.items())}


def standard_error(scores: Sequence[float]) -> float | None:
    """Standard error of the mean of independent prompts; None for a single one."""
    if len(scores) < 2:
        return None
    mean = sum(scores) / len(scores)
    return math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1) / len(scores))


def paired_difference(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    """Mean difference of two models' losses on the same windows, nats, and its standard error (None: one window)."""
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    return sum(differences) / len(differences), standard_error(differences)


def relative(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Perplexity against the other model's on the same windows, e.g. `-3.1% ± 0.4`; empty where it is not finite."""
    mean, error = paired_difference(mine, theirs)
    if not math.isfinite(mean):
        return ""
    ratio = exponential(mean)
    return f"{ratio - 1:+.1%}" + ("" if error is None else f" ± {100 * ratio * error:.1f}")


def lost_and_won(cells: Sequence[Scored], base: Sequence[Scored], base_context: int) -> list[str]:
    """Sentences on retrieval against the base, task by task, at lengths that the base itself serves.

    Args:
        cells: of the model.
        base: of the base, same tasks.
        base_context: tokens the base was made for.
    """
    said = []
    for task in dict.fromkeys(cell.task for cell in cells):
        own = by_length(cell for cell in cells if cell.task == task and cell.length <= base_context)
        theirs = by_length(cell for cell in base if cell.task == task and cell.length <= base_context)
        for length in sorted(own.keys() & theirs.keys()):
            (mine, _), (before, count) = own[length], theirs[length]
            if before == 0:
                said.append(f"{task} at {length} tokens: the base scores 0 here: nothing to lose or win.")
            elif mine < before:
                said.append(
                    f"{task} at {length} tokens: {mine:.0%} where the base has {before:.0%} "
                    f"({counted(count, 'prompt')}): retrieval that the base had is lost."
                )
    return said


NOTICED = 0.01
"""Of perplexity: what nobody would mind is not said."""


def reads_worse(mine: EvalReport, base: EvalReport, base_context: int) -> list[str]:
    """Sentences on lengths that the base itself serves and the model reads worse: by more than chance, and `NOTICED`.

    Args:
        mine, base: of the same windows.
        base_context: tokens the base was made for.
    """
    said = []
    results = {result.length: result for result in base.lengths}
    for own in mine.lengths:
        theirs = results.get(own.length)
        if theirs is None or own.length > base_context or len(own.window_nll) != len(theirs.window_nll):
            continue
        if not own.window_nll:
            continue
        mean, error = paired_difference(own.window_nll, theirs.window_nll)
        if mean > max(2 * (error or 0.0), math.log(1 + NOTICED)):
            doubt = "" if error is not None else " (one window: it may be chance)"
            said.append(f"reads {own.length} tokens {exponential(mean) - 1:.1%} worse than the base does{doubt}.")
    return said


@dataclass(frozen=True)
class Found:
    """All that was measured of one model that its base can be compared in."""

    perplexity: EvalReport | None
    cells: Sequence[Scored] = ()
    """Of retrieval and RULER."""

    def against(self, base: Found, base_context: int) -> list[str]:
        """What was lost at lengths that the base serves, one sentence each; see `lost_and_won` and `reads_worse`."""
        said = lost_and_won(self.cells, base.cells, base_context)
        if self.perplexity is not None and base.perplexity is not None:
            said += reads_worse(self.perplexity, base.perplexity, base_context)
        return said


@dataclass(frozen=True)
class RetrievalReport(ModelReport[CellResult]):
    """What one model retrieves."""

    kind = CellResult
    otherwise = "is not a retrieval report"

    def answers(self, grids: Sequence[RetrievalSettings], text: str) -> bool:
        """Whether it tells of every cell of these grids, by as many prompts or more.

        Args:
            text: fingerprint of the held-out tokens.
        """
        found = {cell.place: len(cell.scores) for cell in self.cells}
        return self.text in (None, text) and all(
            grid.seed == self.seed and found.get((grid.name, length, depth), 0) >= grid.trials
            for grid in grids
            for length in grid.lengths
            for depth in grid.depths
        )

    def write(self, path: Path) -> None:
        """Write as JSON, in one step; OSError if the disk refuses."""
        replace_json(path, self.to_json())


def report_path(output: Path, label: str) -> Path:
    """Where the report of a label lies."""
    return output / f"retrieval-{label}.json"
