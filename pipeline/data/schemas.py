"""Which of the known forms of conversations a record has."""

from __future__ import annotations

from typing import Any

COLUMNS = ("messages", "conversations", "instruction", "input", "output", "system", "tools")
"""Every key of a record that is read, at its top."""
LISTS = {"messages": "messages", "conversations": "ShareGPT"}
"""Schemas whose turns are a list, by its key."""


def schema_of(record: dict[str, Any]) -> str | None:
    """messages | ShareGPT | Alpaca, as a record's keys tell; None: none of them."""
    for key, schema in LISTS.items():
        if isinstance(record.get(key), list):
            return schema
    if "instruction" in record:
        return "Alpaca"
    # Of that schema, though there is nothing in it, or something else: a record that is left out and counted.
    return next((schema for key, schema in LISTS.items() if key in record), None)
