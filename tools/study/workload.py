"""What a study's runs read, before anything is spent. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.planning.arch import read_arch
from tools.study.plan import Places, Recipe, Study, configure


def tokens_of(study: Study, recipe: Recipe, seed: int, places: Places, own_context: int) -> tuple[int, int]:
    """Tokens that are trained on, 0 where they follow from a time or nothing is trained, and tokens that are read to
    judge by perplexity and retrieval.

    Args:
        own_context: tokens the base was made for.

    Raises:
        ConfigError: the recipe's settings are no valid run.
    """
    config, judge = configure(study, recipe, seed, places, own_context), study.judge
    trained = 0
    if not (recipe.untrained or recipe.budgeted or recipe.of):
        trained = config.train.steps * config.train.global_batch * config.sequence
    prompts = len(judge.tasks) * len(judge.depths) * judge.trials
    shares = judge.windows * sum(judge.lengths) + prompts * sum(judge.retrieval_lengths)
    return trained, round(own_context * shares)


def listing(study: Study, places: Places) -> Iterator[str]:
    """A line a run, in order, then all together.

    Raises:
        ConfigError, CheckpointError: a recipe is no valid run, or the base cannot be read.
    """
    own, total = read_arch(places.model).max_positions, [0, 0]
    for number, (recipe, seed) in enumerate(study.order(), start=1):
        train, read = tokens_of(study, recipe, seed, places, own)
        total = [total[0] + train, total[1] + read]
        steps = "steps as a time allows" if recipe.budgeted else f"trains {train / 1e6:.2f}M tokens"
        what = "is not trained" if recipe.untrained else steps if recipe.of is None else f"is {recipe.of}, weaker"
        yield f"{number:3d}  {recipe.name}, seed {seed}: {what}, is judged on {read / 1e6:.2f}M"
    trained, judged = (f"{count / 1e6:.1f}M" for count in total)
    yield f"all: {trained} tokens trained, {judged} read to judge (RULER and tails not counted)"
