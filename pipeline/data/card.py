"""A data card: what a prepared folder holds, as card.json and card.md beside its shards; no run reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.document_ends import described
from pipeline.reporting.words import counted

CARD, PAGE = "card.json", "card.md"
MIXTURE_PAGE = "mixture.md"
"""In a run's output."""
QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Notes:
    """What only the program that prepares the folder knows."""

    left_out: Mapping[str, int] = field(default_factory=dict)
    """Documents or records left out, by reason."""
    first: Mapping[str, str] = field(default_factory=dict)
    """Place of the first one by reason, where it is known."""
    scored: int | None = None
    """Tokens of conversations that the loss counts."""
    warnings: Sequence[str] = ()
    """Sentences about the rest."""


def card_of(
    lengths: NDArray[np.int64], ends: tuple[int | None, int | None], sources: Sequence[int], notes: Notes
) -> dict[str, Any]:
    """The card as JSON takes it.

    Args:
        lengths: tokens of every document, BOS and EOS included, [documents], at least one.
        ends: ids that begin and end every document of text; None: nothing does.
        sources: bytes on disk of every file.
    """
    # A quantile is the length of a document that is there, not one between two.
    quantiles = np.quantile(lengths, QUANTILES, method="inverted_cdf")
    reasons = {
        reason: {"count": count, **({"first": notes.first[reason]} if reason in notes.first else {})}
        for reason, count in sorted(notes.left_out.items())
        if count
    }
    return {
        "kind": "text" if notes.scored is None else "conversations",
        "documents": int(lengths.size),
        "tokens": int(lengths.sum()),
        **({} if notes.scored is None else {"scored_tokens": notes.scored}),
        **({"bos_id": ends[0], "eos_id": ends[1]} if notes.scored is None else {}),
        "lengths": {f"{100 * share:g}%": int(value) for share, value in zip(QUANTILES, quantiles, strict=True)},
        "mean_length": round(float(lengths.mean()), 2),
        "sources": {"files": len(sources), "bytes": sum(sources)},
        "left_out": reasons,
        "warnings": list(notes.warnings),
    }


def page_of(card: Mapping[str, Any]) -> str:
    """The card in Markdown."""
    scored = f", {card['scored_tokens']:,} of them scored" if "scored_tokens" in card else ""
    sources = card["sources"]
    what = "document" if card["kind"] == "text" else "conversation"
    ends = "They begin and end as the chat template says."
    if card["kind"] == "text":
        ends = f"A document {described(card['bos_id'], card['eos_id'])}."
    lines = [
        "# Data card",
        "",
        f"{counted(card['documents'], what, grouped=True)}, {counted(card['tokens'], 'token', grouped=True)}{scored}, "
        f"out of {counted(sources['files'], 'file', grouped=True)} of "
        f"{counted(sources['bytes'], 'byte', grouped=True)}. {ends}",
        "",
        "| share of them no longer than | tokens |",
        "|---|---|",
        *(f"| {share} | {length:,} |" for share, length in card["lengths"].items()),
        f"| mean | {card['mean_length']:,} |",
        "",
    ]
    if card["left_out"]:
        lines += ["| left out because | count | first |", "|---|---|---|"]
        lines += [
            f"| {_cell(reason)} | {row['count']:,} | {_cell(row.get('first', ''))} |"
            for reason, row in card["left_out"].items()
        ]
    else:
        lines.append("Nothing is left out.")
    lines += ["", *(f"- {' '.join(warning.split())}" for warning in card["warnings"])]
    return "\n".join(lines).rstrip() + "\n"


def mixture_page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The data card of a mixture, in Markdown.

    Args:
        rows: of each source path, documents, tokens, windows, share (of the windows read), chat and times_read.
    """
    lines = [
        "# Data card of the mixture",
        "",
        "| source | holds | tokens | windows | share of the windows read | read |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {_cell(row['path'])} | {_held(row)} | {row['tokens']:,} | {row['windows']:,} | {row['share']:.2%} | "
        f"{row['times_read']:.3g} times |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def mixture_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same for the screen, a line a source."""
    return [
        f"{row['share']:.1%} from {row['path']}: {_held(row)}, {counted(row['tokens'], 'token', grouped=True)}, "
        f"{counted(row['windows'], 'window', grouped=True)}, "
        f"each read {row['times_read']:.2g} times"
        for row in rows
    ]


def _held(row: Mapping[str, Any]) -> str:
    return counted(row["documents"], "conversation" if row["chat"] else "document", grouped=True)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def summary(card: Mapping[str, Any]) -> str:
    """One line on lengths, for the screen."""
    lengths = card["lengths"]
    return (
        f"lengths in tokens: 10% {lengths['10%']:,}, median {lengths['50%']:,}, 90% {lengths['90%']:,}, longest "
        f"{lengths['100%']:,}, mean {card['mean_length']:,}"
    )


def write_card(folder: Path, card: Mapping[str, Any]) -> tuple[str, ...]:
    """Write both files into `folder`; returns their names.

    Raises:
        OSError: they cannot be written.
    """
    (folder / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(page_of(card), encoding="utf-8")
    return CARD, PAGE


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card of a prepared folder; None: it has none (an earlier release's), or a damaged one."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        summary(card)
        return card if isinstance(card, dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
