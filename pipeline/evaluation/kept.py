"""Results that are kept as they are found, so that nothing is done twice, and reports that are whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, cast

from parallel.errors import DataError
from pipeline.storage.json_file import replace_json

VERSION = 2
"""Of the measurement: another one does not take over what this one found."""
PART = "strength-"
"""How labels begin of weights some of the way from the base's to the trained ones; the share of the way follows."""
OF_RUN = "run"
"""Whose report it is, where an evaluation of its own measured the model of the run in that folder."""


def write_report(path: Path, data: Mapping[str, Any]) -> None:
    """Write a report as JSON, in one step.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        replace_json(path, data)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); free space there.") from None


def same_model(found: str | None, earlier: str | None) -> bool:
    """Whether two reports of a label and a step, in one folder, are of the same weights.

    Args:
        found: whose model was measured now: None: the run's, by itself; OF_RUN; or a hash of another one's identity.
        earlier: of the report that is there.
    """
    return found is None or earlier == found or (found == OF_RUN and earlier is None)


class Kept(Protocol):
    """One result."""

    @property
    def place(self) -> tuple[Any, ...]:
        """Where in a grid it stands: in order, and another for each cell of a report."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; KeyError, TypeError or ValueError where it is none."""


class KeptResults[Result: Kept]:
    """Results by key in a JSON file, which is whole whenever the process is killed.

    Args:
        path: the file; None keeps nothing.
        text: what it holds, where somebody else has read it; None: read it.

    Raises:
        DataError: the file is there and is not one of these.
    """

    kind: type[Result]
    """Of each result."""
    called = "results"
    """What all of them are, for the sentences."""

    def __init__(self, path: Path | None, text: str | None = None) -> None:
        self.path = path
        self.cells: dict[str, Result] = {}
        if text is None:
            text = self.text_of(path)
        if not text:
            return
        try:
            data = json.loads(text)
            self.cells = {str(key): self.kind.from_json(entry) for key, entry in data["cells"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: does not hold {self.called} ({type(error).__name__}: {error}); move it away, and rerun."
            ) from None

    @staticmethod
    def text_of(path: Path | None) -> str:
        """What a file of results holds; empty: there is none.

        Raises:
            DataError: it cannot be read.
        """
        try:
            return "" if path is None or not path.exists() else path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); mend or remove it, and rerun.") from None

    def add(self, found: Mapping[str, Result]) -> None:
        """Keep results.

        Raises:
            DataError: the file cannot be written.
        """
        self.cells |= found
        if self.path is None:
            return
        write_report(
            self.path, {"version": VERSION, "cells": {key: cell.to_json() for key, cell in self.cells.items()}}
        )


@dataclass(frozen=True)
class ModelReport[Result: Kept]:
    """What one model was found to do, cell by cell."""

    label: str
    """As in `EvalReport`."""
    step: int
    """Optimizer steps the model was trained for."""
    context: int
    """Tokens the model is made for."""
    base_context: int
    """Tokens the base was made for, as its config.json says."""
    cells: tuple[Result, ...]
    seed: int = 0
    """Of the prompts."""
    text: str | None = None
    """Fingerprint of the held-out tokens; None: an earlier release did not note it."""
    model: str | None = None
    """See `same_model`."""

    kind: ClassVar[type[Kept]]
    """Of each cell."""
    otherwise: ClassVar[str]
    """What is said of a file that holds something else."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        names = ("label", "step", "context", "base_context", "seed", "text", "model")
        facts = {name: getattr(self, name) for name in names}
        return {**facts, "cells": [cell.to_json() for cell in self.cells]}

    def with_further(self, path: Path) -> Self:
        """This report and the further cells of the one at `path`, if that is of the same model, text and seed."""
        try:
            earlier = self.read(path)
        except DataError:
            return self
        alike = (earlier.step, earlier.text, earlier.seed) == (self.step, self.text, self.seed)
        if not alike or not same_model(self.model, earlier.model):
            return self
        cells = {cell.place: cell for cell in (*earlier.cells, *self.cells)}
        return (
            self if len(cells) == len(self.cells) else replace(self, cells=tuple(cells[key] for key in sorted(cells)))
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `to_json` made.

        Raises:
            DataError: the file is missing or is not such a report.
        """
        try:
            data = json.loads(path.read_text())
            cells = tuple(cls.kind.from_json(entry) for entry in data["cells"])
            step, context, base_context = (int(data[name]) for name in ("step", "context", "base_context"))
            asked = int(data.get("seed", 0)), data.get("text"), data.get("model")
            return cls(str(data["label"]), step, context, base_context, cast(Any, cells), *asked)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: {cls.otherwise} ({type(error).__name__}: {error}); evaluate again.") from None
