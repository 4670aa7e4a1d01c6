"""What every evaluation does around its forwards: evaluation mode, and how windows are spread over replicas."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from parallel.world.collectives import sum_over
from parallel.world.groups import Groups
from pipeline.evaluation.perplexity import Shards
from pipeline.model.rank_model import RankModel


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
