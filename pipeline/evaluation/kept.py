"""Results that are kept as they are found, so that nothing is done twice, and reports that are whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from parallel.errors import DataError
from pipeline.storage.durable import replace_text

VERSION = 2
"""Of the measurement: another one does not take over what this one found."""


def write_report(path: Path, data: Mapping[str, Any]) -> None:
    """Write a report as JSON, in one step.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); free space there.") from None


class Kept(Protocol):
    """One result."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""


class KeptResults[Result: Kept]:
    """Results by key in a JSON file, which is whole whenever the process is killed.

    Args:
        path: the file; None keeps nothing.
        text: what it holds, where somebody else has read it; None: read it.

    Raises:
        DataError: the file is there and is not one of these.
    """

    def __init__(self, path: Path | None, text: str | None = None) -> None:
        self.path = path
        self.cells: dict[str, Result] = {}
        if text is None:
            text = self.text_of(path)
        if not text:
            return
        try:
            data = json.loads(text)
            self.cells = {str(key): self.entry(entry) for key, entry in data["cells"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: does not hold retrieval results ({type(error).__name__}: {error}); move it away, and rerun."
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

    @staticmethod
    def entry(data: Mapping[str, Any]) -> Result:
        """A result from JSON; KeyError, TypeError or ValueError where it is none."""
        raise NotImplementedError
