"""Pieces of HTML that a report's page is put together from."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
.lead { color: #555; margin-top: .2rem; } .note { color: #555; font-style: italic; }
figure { margin: 1rem 0; } figure img { width: 100%; max-width: 50rem; height: auto; } figcaption { color: #555; }
table { border-collapse: collapse; margin: .6rem 0; } .scroll { overflow-x: auto; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #e3e3e3; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.text { overflow-wrap: anywhere; }
small { color: #666; }
"""


def show(value: Any) -> str:
    """A value for a reader, not yet escaped."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value)) or "–"
    return str(value)


def table(head: Sequence[str], lines: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """An HTML table from unescaped cells; with `numbers`, all columns but the first are right-aligned.

    An empty `head` makes no heading row.
    """

    def cells(tag: str, values: Sequence[str]) -> str:
        kinds = ["number" if numbers and index else "text" for index in range(len(values))]
        return "".join(
            f'<{tag} class="{kind}">{escape(value)}</{tag}>' for kind, value in zip(kinds, values, strict=True)
        )

    body = "".join(f"<tr>{cells('td', line)}</tr>\n" for line in lines)
    heading = f"<tr>{cells('th', head)}</tr>\n" if head else ""
    return f'<div class="scroll"><table>{heading}{body}</table></div>'


def section(title: str, *parts: str) -> str:
    """A heading and what belongs under it (HTML)."""
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n"


def missing(what: str) -> str:
    """A line where a section's source is not there."""
    return f'<p class="note">{escape(what)}</p>'
