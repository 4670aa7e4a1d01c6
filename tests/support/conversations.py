"""Conversations that tests of records, templates and masks share."""

from __future__ import annotations

from typing import Any

LONG: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "  Where does the whale swim? "},
        {"role": "assistant", "content": "In the sea — naïve 😀"},
        {"role": "user", "content": "And then?\n"},
        {"role": "assistant", "content": " Far from any land. "},
    ]
}
SYSTEM = {"messages": [{"role": "system", "content": "Answer in a word."}, *LONG["messages"]]}
