"""How a run scales on paper: the best layout on more and more GPUs, and up to where each kind of layout pays.

Strong: the same batch on more GPUs. Weak: the batch grows with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from parallel.errors import ConfigError
from pipeline.config.run import RunConfig
from pipeline.planner.choose import Site, Timed, streamed, within
from pipeline.planner.gpus import Gpu
from pipeline.planner.search import best_by_kind
from pipeline.planning.arch import LlamaArch

PAYS = 0.05
"""Of the best layout's time, more than which another kind must not take to pay."""


@dataclass(frozen=True)
class Point:
    """One number of GPUs."""

    gpus: int
    batch: int
    """Sequences an optimizer step."""
    best: Timed | None
    """None: nothing fits, or the batch does not divide."""
    kinds: dict[str, Timed]
    """The best of every kind of layout."""

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU, under the best layout; 0 where there is none."""
        return 0.0 if self.best is None else self.best.tokens_per_second


def scale(
    config: RunConfig, stored: LlamaArch, gpu: Gpu, counts: Sequence[int], *, weak: bool, host: int | None = None
) -> list[Point]:
    """The best layouts on each of `counts` GPUs.

    Args:
        config: its batch is that of the first count.
        host: host memory of one machine, bytes; None: the description's.

    All layers of a layout have one policy; `choose.choices` mixes them as well.

    Raises:
        ConfigError: a count does not fill whole machines, or no layout can be on any of them.
    """
    points, refused = [], None
    for gpus in counts:
        site = within(config, Site.of(gpu, gpus, host))
        batch = config.train.global_batch * gpus // counts[0] if weak else config.train.global_batch
        wanted = replace(config, train=replace(config.train, global_batch=batch))
        try:
            kinds = best_by_kind(wanted, stored, site)
            in_chunks = None if kinds else streamed(wanted)
            if in_chunks is not None:
                kinds = best_by_kind(in_chunks, stored, site)
        except ConfigError as error:
            refused, kinds = error, {}
        points.append(Point(gpus, batch, next(iter(kinds.values()), None), kinds))
    if refused is not None and not any(point.kinds for point in points):
        raise refused
    return points


def efficiency(points: Sequence[Point]) -> list[float | None]:
    """Tokens a second of one GPU over those where the fewest GPUs fit."""
    first = next((point.tokens_per_second for point in points if point.best), None)
    return [point.tokens_per_second / first if first and point.best else None for point in points]


def where_it_stops(points: Sequence[Point]) -> list[str]:
    """For every kind of layout a sentence: from where to where it pays, and what it costs beyond."""
    found = []
    for kind in dict.fromkeys(kind for point in points for kind in point.kinds):
        paying = [point for point in points if _pays(point, kind)]
        if not paying:
            continue
        last = paying[-1]
        beyond = next((point for point in points if point.gpus > last.gpus and kind in point.kinds), None)
        sentence = f"{kind} pays from {paying[0].gpus} to {last.gpus} GPUs"
        if beyond is not None and beyond.best is not None:
            one = beyond.kinds[kind]
            slower = one.time.total / beyond.best.time.total - 1
            parts = {part: s - beyond.best.time.parts.get(part, 0.0) for part, s in one.time.parts.items()}
            cause = max(parts, key=lambda part: parts[part])
            sentence += f"; on {beyond.gpus} it takes {slower:.0%} longer than the best ({cause})"
        found.append(sentence + ".")
    return found


def _pays(point: Point, kind: str) -> bool:
    if point.best is None or kind not in point.kinds:
        return False
    return point.kinds[kind].time.total <= (1 + PAYS) * point.best.time.total
