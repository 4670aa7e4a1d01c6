"""What every evaluation does around its forwards: evaluation mode, windows over replicas, results found before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from parallel.world.collectives import share_from_main, sum_over
from parallel.world.groups import Groups
from pipeline.evaluation.kept import KeptResults
from pipeline.evaluation.spread import Shards
from pipeline.model.rank_model import RankModel


def kept_alike[Kept: KeptResults[Any]](kind: type[Kept], path: Path | None, groups: Groups) -> Kept:
    """Results of earlier processes, alike on every rank; rank 0 keeps what is added. Collective.

    Args:
        path: the file, as rank 0 sees it; None keeps nothing.

    Raises:
        DataError: see `KeptResults`.
    """
    text = share_from_main(groups, lambda: kind.text_of(path))
    return kind(path if groups.is_main else None, text)


@contextlib.contextmanager
def evaluating(model: RankModel) -> Iterator[None]:
    """Within, the model is in evaluation mode; after it in that which it was in."""
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)


def spread_over(model: RankModel, groups: Groups, before_round: Callable[[], None] = lambda: None) -> Shards:
    """This rank's share of the windows, see `Shards`."""
    return Shards(
        groups.data_rank,
        groups.plan.dp,
        lambda table: sum_over(groups.replicas, table),
        lockstep=model.shards is not None,
        before_round=before_round,
    )
