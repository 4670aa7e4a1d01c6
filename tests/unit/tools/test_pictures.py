"""What the pages' pictures show is what attention by its definition, and the streaming trainer, do."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from pipeline.model.streaming import SequenceStream
from tests.numerics.attention_oracle import table
from tests.support.browser import look
from tools.support import pictures
from tools.support.pictures import DOCUMENTS, GROUP, PICTURES, RANKS, SHIFTED, TOKENS, UNSHIFTED

SHARD = TOKENS // RANKS


def shapes(svg: str, *names: str) -> list[tuple[ElementTree.Element, list[str]]]:
    """Rectangles that carry all of these data attributes, with their values."""
    found = []
    for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect"):
        values = [element.get(f"data-{name}") for name in names]
        if None not in values:
            found.append((element, [value for value in values if value is not None]))
    return found


def seen(svg: str) -> list[tuple[str, np.ndarray]]:
    """Colour and bool [query, key] of every panel, in order."""
    panels: list[tuple[str, np.ndarray]] = []
    for element, (query, keys) in shapes(svg, "query", "keys"):
        if query == "0":
            panels.append((element.get("fill", ""), np.zeros((TOKENS, TOKENS), bool)))
        first, last = map(int, keys.split("-"))
        panels[-1][1][int(query), first : last + 1] = True
    return panels


def test_the_masks_are_those_of_the_definition() -> None:
    real, one = np.ones(TOKENS, bool), np.zeros(TOKENS, int)
    two = np.searchsorted(DOCUMENTS[1:-1], np.arange(TOKENS), side="right")
    wanted = [
        (UNSHIFTED, table(real, one, GROUP, False)),
        (SHIFTED, table(real, one, GROUP, True)),
        (SHIFTED, table(real, two, GROUP, True)),
        ("#777777", table(real, one, None, False)),
    ]
    found = seen(PICTURES["s2_attention.svg"]())
    assert len(found) == len(wanted)
    for (color, drawn), (expected_color, mask) in zip(found, wanted, strict=True):
        assert color == expected_color and (drawn == mask).all()
    assert (wanted[1][1] != wanted[2][1]).any(), "the documents' edge is no group's edge"


def halo_of(rank: int) -> tuple[int, int] | None:
    """First and last plus one of the tokens before a shard that its queries see, by the definition."""
    masks = [table(np.ones(TOKENS, bool), np.zeros(TOKENS, int), GROUP, shifted) for shifted in (False, True)]
    keys = np.flatnonzero((masks[0] | masks[1])[rank * SHARD : (rank + 1) * SHARD].any(axis=0))
    before = keys[keys < rank * SHARD]
    return (int(before[0]), int(before[-1]) + 1) if before.size else None


@pytest.mark.parametrize("name", ["context_parallelism.svg", "streaming.svg"])
def test_the_halos_are_what_the_next_shard_sees(name: str) -> None:
    svg = PICTURES[name]()
    found = {int(rank): tuple(map(int, tokens.split("-"))) for _, (tokens, rank) in shapes(svg, "halo", "receiver")}
    assert found == {rank: halo for rank in range(RANKS) if (halo := halo_of(rank)) is not None} and len(found) == 3
    if name == "context_parallelism.svg":
        (start, stop) = found[1]
        assert f"K and V of {stop - start} tokens" in svg and f"sends {(RANKS - 1) * SHARD} tokens" in svg


def test_the_passes_are_the_trainers() -> None:
    passes = [int(chunk) for _, (_, chunk) in shapes(PICTURES["streaming.svg"](), "pass", "chunk")]
    assert passes == [0, 1, 2, 3, 2, 1, 0]
    stream: Any = SimpleNamespace(chunk=SHARD)
    assert len(passes) == SequenceStream.passes(stream, TOKENS)


def test_another_layout_is_another_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: draw() for name, draw in PICTURES.items()}
    monkeypatch.setattr(pictures, "GROUP", 16)
    assert all(draw() != before[name] for name, draw in PICTURES.items())


def test_a_browser_shows_them(tmp_path: Any) -> None:
    page = tmp_path / "page.html"
    page.write_text("<html><head></head><body>" + "".join(draw() for draw in PICTURES.values()) + "</body></html>")
    found = look(page)
    assert found.complaints == [] and len(found.svgs) == len(PICTURES) and min(found.svgs) >= 600
    assert not re.search(r'(?:href|src)="http', page.read_text())
