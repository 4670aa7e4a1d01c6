"""Rows of a benchmark: shown as a table, kept as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tools.support.command_line import console_of

Row = Mapping[str, Any]


def print_rows(rows: Sequence[Row], title: str, width: int, columns: Sequence[str] | None = None) -> None:
    """Print a table.

    Args:
        rows: of names and values; one that a row lacks is left blank.
        width: of the table where there is no terminal.
        columns: None: every name, in the order they come.
    """
    names = list(dict.fromkeys(name for row in rows for name in row)) if columns is None else list(columns)
    table = Table(title=title)
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        values = (row.get(name, "") for name in names)
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values))
    console_of(width).print(table)


def append_rows(path: Path | None, rows: Sequence[Row], **facts: Any) -> None:
    """Append one JSON line a row, with what holds for all of them; None: nothing."""
    if path is None:
        return
    shared = {key: str(value) if isinstance(value, Path) else value for key, value in facts.items()}
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**shared, **row}) + "\n" for row in rows)
