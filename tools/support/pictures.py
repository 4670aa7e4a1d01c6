"""Pictures of docs/, as SVG, drawn from the code that decides what they show: groups, halos, chunks.

Nothing here says which tokens meet or what is sent: `pipeline.planning` does, for a sequence small enough to be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise

from parallel.axes.halo_plan import HaloPlan, equal_edges
from parallel.world.grid import GridPlan
from pipeline.planning.attention_layout import AttentionSpec, HeadPlan, SequenceLayout, head_plan
from pipeline.planning.context_shards import halo_plan
from pipeline.planning.stream import StreamPlan

TOKENS, GROUP, RANKS = 32, 8, 4
"""Of the sequence that is drawn; the ranks, or chunks, share it."""
DOCUMENTS = (0, 18, TOKENS)
"""Where the documents of the packed sequence begin and end."""
HEADS, KV_HEADS = 8, 8
BLUE, ORANGE, GREY, INK = "#0072B2", "#E69F00", "#DDDDDD", "#1A1A1A"
UNSHIFTED, SHIFTED = BLUE, ORANGE
"""Colours of the two halves of the heads, in Okabe and Ito's safe palette."""
_FONT = 'font-family="system-ui, sans-serif"'


def _rect(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{more}/>'


def _text(x: float, y: float, words: str, size: int = 13, anchor: str = "start", fill: str = INK) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>'


def _arrow(path: str, color: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2" marker-end="url(#tip)"/>'


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    """One picture on white, which both of the pages' colours can stand around."""
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
        f'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" {_FONT}>'
    )
    body = [f"<title>{escape(title)}</title>", tip, _rect(0, 0, width, height, "#FFFFFF", ' rx="8"'), *parts]
    return "\n".join([head, *body, "</svg>"]) + "\n"


def _heads() -> HeadPlan:
    return head_plan(0, HEADS, HEADS, KV_HEADS, "upper_half")


def _panel(left: int, top: int, title: str, under: str, cuts: Sequence[tuple[int, int]], color: str) -> list[str]:
    """One head's attention: a row a query, from the first key it sees to itself."""
    cell, parts = 7, [_text(left, top - 12, title, 14)]
    side = cell * TOKENS
    parts.append(_rect(left, top, side, side, "#F6F6F6"))
    for start, stop in cuts:
        for query in range(start, stop):
            width = (query - start + 1) * cell - 1
            shape = f' data-query="{query}" data-keys="{start}-{query}"'
            parts.append(_rect(left + start * cell, top + query * cell, width, cell - 1, color, shape))
    parts.append(_text(left, top + side + 18, under, 12, fill="#555555"))
    return parts


def attention_picture() -> str:
    """Who sees whom: both halves of the heads, packed documents, and full attention."""
    whole = SequenceLayout.dense(1, TOKENS)
    ids = [[index for index, (start, stop) in enumerate(pairwise(DOCUMENTS)) for _ in range(start, stop)]]
    packed = SequenceLayout.build(1, TOKENS, None, ids)
    panels = [
        (f"half of the heads: groups of G = {GROUP}", whole.segments(GROUP, False), UNSHIFTED),
        ("the other half: groups shifted by G/2", whole.segments(GROUP, True), SHIFTED),
        (f"shifted, two documents (edge at {DOCUMENTS[1]})", packed.segments(GROUP, True), SHIFTED),
        ("full attention: evaluation", whole.segments(None), "#777777"),
    ]
    parts = []
    for number, (title, cuts, color) in enumerate(panels):
        left, top = 24 + 310 * (number % 2), 44 + 300 * (number // 2)
        under = "keys to the right, queries downwards"
        parts += _panel(left, top, title, under, [(start, stop) for _, start, stop in cuts], color)
    return _svg("Which key each query sees under shifted sparse attention", 620, 610, parts)


def _bands(left: int, top: int, cell: int) -> list[str]:
    """The groups of both halves of the heads over the sequence."""
    parts, layout = [], SequenceLayout.dense(1, TOKENS)
    for row, (shifted, color) in enumerate(((False, UNSHIFTED), (True, SHIFTED))):
        y = top + 24 * row
        parts.append(_text(left - 10, y + 13, "shifted heads" if shifted else "half of the heads", 12, "end"))
        for _, start, stop in layout.segments(GROUP, shifted):
            parts.append(_rect(left + start * cell + 1, y, (stop - start) * cell - 2, 18, color, ' opacity="0.75"'))
    return parts


def _halos(plan: HaloPlan) -> list[tuple[int, int, int]]:
    """(first token, last plus one, receiver) of every message's tokens."""
    return [
        (min(piece.start for piece in message.pieces), max(piece.stop for piece in message.pieces), message.receiver)
        for message in plan.messages
    ]


def context_picture() -> str:
    """A sequence over ranks, and the halo that each gets from the one before."""
    left, cell, shard = 130, 16, TOKENS // RANKS
    spec, layout = AttentionSpec("s2", GROUP), SequenceLayout.dense(1, TOKENS)
    plan = halo_plan(layout, spec, _heads(), equal_edges(RANKS, shard))
    parts = [_text(24, 30, f"{TOKENS} tokens over {RANKS} ranks (cp: {RANKS}), groups of {GROUP}", 15)]
    parts += _bands(left, 48, cell)
    y = 130
    parts.append(_text(left - 10, y + 20, "ranks", 12, "end"))
    for rank in range(RANKS):
        x = left + rank * shard * cell
        parts += [
            _rect(x + 1, y, shard * cell - 2, 30, GREY, ' rx="3"'),
            _text(x + shard * cell / 2, y + 20, f"rank {rank}", 13, "middle"),
        ]
    for start, stop, receiver in _halos(plan):
        x, width = left + start * cell, (stop - start) * cell
        mark = f' data-halo="{start}-{stop}" data-receiver="{receiver}"'
        parts.append(_rect(x + 1, y + 34, width - 2, 10, SHIFTED, mark))
        middle, end = x + width / 2, left + (receiver + 0.25) * shard * cell
        parts.append(_arrow(f"M{middle:g} {y + 46}C{middle:g} {y + 84} {end:g} {y + 84} {end:g} {y + 34}", INK))
    sent = max((stop - start for start, stop, _ in _halos(plan)), default=0)
    ring = (RANKS - 1) * shard
    parts += [
        _text(left, y + 106, f"K and V of {sent} tokens of the shifted heads go one rank on, once a layer;", 13),
        _text(left, y + 124, f"ring attention sends {ring} tokens of all heads from every rank.", 13),
    ]
    return _svg("Context parallelism sends a halo from rank to rank", 680, 280, parts)


def _passes(cut: StreamPlan) -> list[tuple[int, str]]:
    """(chunk, what is done) in order, as `pipeline.model.streaming` does it."""
    last = len(cut.starts) - 1
    forward = [(chunk, "forward") for chunk in range(last)]
    return [*forward, (last, "both"), *((chunk, "again") for chunk in reversed(range(last)))]


def streaming_picture() -> str:
    """The passes over a sequence's chunks in time, and the halos that wait in host memory between them."""
    left, top, cell, chunk = 130, 60, 16, TOKENS // RANKS
    cut = StreamPlan.of(TOKENS, chunk, GridPlan(1, 1, 1, 1))
    layout, spec = SequenceLayout.dense(1, TOKENS), AttentionSpec("s2", GROUP)
    halos = _halos(halo_plan(layout, spec, _heads(), cut.edges))
    parts = [_text(24, 30, f"One GPU, {TOKENS} tokens in {len(cut.starts)} chunks, groups of {GROUP}", 15)]
    colors = {"forward": "#9CC9E3", "both": BLUE, "again": BLUE}
    words = {"forward": "forward", "both": "forward, backward", "again": "again, backward"}
    passes = _passes(cut)
    for row, (number, what) in enumerate(passes):
        x, y = left + cut.starts[number] * cell, top + 34 * row
        parts += [
            _rect(x + 1, y, chunk * cell - 2, 24, colors[what], f' rx="3" data-pass="{row}" data-chunk="{number}"'),
            _text(x + chunk * cell / 2, y + 16, words[what], 12, "middle", INK if what == "forward" else "#FFFFFF"),
        ]
        for start, stop, receiver in halos:
            if what == "forward" and cut.starts[number] <= start < cut.starts[number] + chunk:
                at, width = left + start * cell, (stop - start) * cell
                mark = f' data-halo="{start}-{stop}" data-receiver="{receiver}"'
                parts.append(_rect(at + 1, y + 24, width - 2, 5, SHIFTED, mark))
    bottom = top + 34 * len(passes)
    parts += [
        _arrow(f"M40 {top}L40 {bottom - 10}", INK),
        _text(52, top + 12, "time", 12),
        _rect(left, bottom + 8, 24, 5, SHIFTED),
        _text(left + 32, bottom + 15, "halo: keys and values that the next chunk reads, parked in host memory;", 12),
        _text(left + 32, bottom + 32, "in the backward its gradients come back the same way.", 12),
    ]
    return _svg("Streaming: forward chunk by chunk, then backward from the last to the first", 680, bottom + 50, parts)


PICTURES = {
    "s2_attention.svg": attention_picture,
    "context_parallelism.svg": context_picture,
    "streaming.svg": streaming_picture,
}
"""Names in docs/images/."""
