"""The grid an evaluation runs on: perplexity does not depend on it, so it takes the ranks it has. No torch."""

from __future__ import annotations

import math
from dataclasses import replace

from pipeline.config.run import RunConfig


def fit_ranks(config: RunConfig, world: int) -> RunConfig:
    """The run's configuration with a grid, and a batch, that `world` ranks can have.

    The training grid where the ranks are a multiple of it. Otherwise each axis shrinks to a divisor of itself, so that
    what it divided it still divides: tensor parallelism last, which makes a rank's share of the model smaller.

    Args:
        config: of the training run.
        world: ranks of the evaluation, at least 1.
    """
    parallel = config.parallel
    tp, cp, pp, virtual = parallel.tp, parallel.cp, parallel.pp, parallel.virtual
    if world % (tp * cp * pp):
        tp = math.gcd(tp, world)
        pp = math.gcd(pp, world // tp)
        cp = math.gcd(cp, world // (tp * pp))
        virtual = virtual if pp > 1 else 1
    dp = world // (tp * cp * pp)
    # No step is taken; the batch only has to be one that the grid can cut.
    batch = config.train.micro_batch * dp * pp
    return replace(
        config,
        parallel=replace(parallel, tp=tp, cp=cp, pp=pp, virtual=virtual),
        train=replace(config.train, global_batch=batch),
    )
