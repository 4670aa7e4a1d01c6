"""Which of the known forms of conversations a record has."""

from __future__ import annotations

from typing import Any

COLUMNS = ("messages", "conversations", "instruction", "input", "output", "system", "tools")
"""Every key of a record that is read, at its top."""


def schema_of(record: dict[str, Any]) -> str | None:
    """messages | ShareGPT | Alpaca, as a record's keys tell; None: none of them."""
    if isinstance(record.get("messages"), list):
        return "messages"
    if isinstance(record.get("conversations"), list):
        return "ShareGPT"
    if "instruction" in record:
        return "Alpaca"
    return None
