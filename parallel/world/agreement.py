"""What every rank must bring alike to the meeting, compared through the ranks' store: on any backend, before any group.

Each machine reads its own copy of the YAML, of the program and of the model. Ranks that differ there train to the end
all the same, and what comes out is nobody's run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from parallel.errors import ConfigError

if TYPE_CHECKING:
    import torch.distributed as dist

SHOWN = 4
"""Differences a sentence names, and values it lists of one of them; the rest is counted."""
VALUE_LETTERS = 80
FAREWELL_S = 10.0
"""Rank 0, which may host the store, stays so long to let every rank read the refusal."""


def require_alike(
    store: dist.Store, rank: int, world: int, topic: str, facts: Mapping[str, str], patience: timedelta
) -> None:
    """Return once every rank has brought the same facts; every rank must call this.

    Args:
        store: the ranks' store; a key of it is used once, under `topic`.
        rank, world: this rank among how many.
        topic: names this comparison, unlike any other in the store.
        facts: name -> value, as a refusal shows them.
        patience: time the last rank may come after the first.

    Raises:
        ConfigError: on every rank the same sentence, which names the facts, the ranks and the values.
    """
    if world == 1:
        return
    key = f"longspan/alike/{topic}"
    store.set(f"{key}/{rank}", json.dumps(facts, sort_keys=True))
    if rank:
        store.wait([f"{key}/verdict"], patience)
        refusal = store.get(f"{key}/verdict").decode()
        store.add(f"{key}/heard", 1)
        if refusal:
            raise ConfigError(refusal)
        return
    keys = [f"{key}/{other}" for other in range(world)]
    store.wait(keys, patience)
    brought = store.multi_get(keys)
    refusal = "" if all(text == brought[0] for text in brought) else difference([json.loads(text) for text in brought])
    store.set(f"{key}/verdict", refusal)
    if refusal:
        until = time.monotonic() + FAREWELL_S
        while time.monotonic() < until and store.add(f"{key}/heard", 0) < world - 1:
            time.sleep(0.05)
        raise ConfigError(refusal)


def difference(brought: Sequence[Mapping[str, str]]) -> str:
    """One sentence on facts that are not alike.

    Args:
        brought: every rank's facts, by rank; at least two differ.
    """
    names = list(dict.fromkeys(name for facts in brought for name in facts))
    parts = []
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(brought):
            ranks.setdefault(facts.get(name, "missing"), []).append(rank)
        if len(ranks) == 1:
            continue
        values = [f"{_short(value)} on {_ranks(found)}" for value, found in list(ranks.items())[:SHOWN]]
        more = f" and {len(ranks) - SHOWN} other values" if len(ranks) > SHOWN else ""
        parts.append(f"{name} is " + ", ".join(values) + more)
    rest = f"; and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return (
        "The ranks are not of one run: "
        + "; ".join(parts[:SHOWN])
        + rest
        + "; start all of them with the same YAML, --set options, program and model."
    )


def _short(value: str) -> str:
    return value if len(value) <= VALUE_LETTERS else value[:VALUE_LETTERS] + "..."


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-7, 9`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    ranges = [f"{first}" if first == last else f"{first}-{last}" for first, last in spans]
    more = f" and {len(ranges) - SHOWN} more" if len(ranges) > SHOWN else ""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(ranges[:SHOWN]) + more
