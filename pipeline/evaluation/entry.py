"""Where evaluations begin: an evaluator for what `eval.path` holds, and all that one state of a model is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError
from parallel.health.watch import Watch
from parallel.world.groups import Groups
from parallel.world.rank_env import RankEnv
from pipeline.build import open_tokens
from pipeline.config.run import RunConfig
from pipeline.data.chat_settings import check_evaluated, holds_conversations
from pipeline.data.tokenizer import TextTokenizer
from pipeline.evaluation.answers_evaluator import AnswersEvaluator
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.long_ppl import LongPplAsked
from pipeline.evaluation.ruler.tasks import RulerSettings
from pipeline.evaluation.run_retrieval import run_retrieval
from pipeline.evaluation.run_ruler import run_ruler
from pipeline.evaluation.states import LoadedState, load_state_of
from pipeline.evaluation.tasks import Cell, RetrievalSettings, cells
from pipeline.model.rank_model import RankModel
from pipeline.planning.run_plan import RunPlan


def open_evaluator(
    plan: RunPlan,
    model: RankModel,
    groups: Groups,
    tokenizer: TextTokenizer,
    watch: Watch | None = None,
    before_round: Callable[[], None] = lambda: None,
) -> Evaluator | AnswersEvaluator:
    """The evaluator of what `eval.path` holds, text or conversations.

    Args:
        plan, model, groups, tokenizer, before_round: see `Evaluator`.
        watch: learns that a tokenization of hours gets on.

    Raises:
        ConfigError, DataError: it is not set; see `open_tokens` and `AnswersEvaluator`.
    """
    if plan.config.eval.path is None:
        raise ConfigError("eval.path: is not set; point it at held-out text or conversations.")
    shards = open_tokens(plan.config, plan.config.eval.path, tokenizer, groups, watch)
    if shards.scored is not None:
        return AnswersEvaluator(plan, model, groups, shards, before_round)
    return Evaluator(plan, model, groups, tokenizer, shards, before_round)


def evaluate_state(
    config: RunConfig,
    env: RankEnv,
    state: str,
    checkpoint: Path | None = None,
    perplexity: bool = True,
    retrieval: Sequence[RetrievalSettings] = (),
    long_ppl: LongPplAsked | None = None,
    ruler: RulerSettings | None = None,
    strength: float = 1.0,
) -> LoadedState:
    """Load the model in one state, evaluate, write the reports; see `load_state_of`.

    Args:
        perplexity: measure perplexity, as `config.eval` says; of conversations, the loss of their answers always is.
        retrieval: grids to measure.
        long_ppl: None: not measured.
        ruler: tasks and lengths; None: none.
        strength: see `load_state_of`.

    Raises:
        ConfigError, CheckpointError, DataError: one sentence each.
    """
    if config.eval.path is not None and holds_conversations(Path(config.eval.path)):
        asked_more = ["longppl"] * (long_ppl is not None) + [grid.task for grid in retrieval]
        check_evaluated(config, Path(config.eval.path), [*asked_more, *(ruler.tasks if ruler is not None else ())])
        config = replace(config, eval=replace(config.eval, tasks=()))  # those are of the run
    with load_state_of(config, env, state, checkpoint, strength) as loaded:
        evaluator = open_evaluator(loaded.plan, loaded.model, loaded.groups, loaded.tokenizer)
        if isinstance(evaluator, AnswersEvaluator):
            evaluator.run(loaded.label, loaded.step)
            return loaded
        asked: list[Cell] = []
        if retrieval:
            # Before perplexity: what is wrong with them is told at once.
            asked = [cell for settings in retrieval for cell in cells(settings, loaded.tokenizer, evaluator.text_T)]
        riddles, cost = ([], "") if ruler is None else evaluator.riddles(ruler)
        # What earlier evaluations of the same model found stays in its reports.
        kept: Any = {"beside": True, "model_of": loaded.model_of}
        if perplexity:
            evaluator.run(loaded.label, loaded.step, **kept)
        if long_ppl is not None:
            evaluator.measure_long_ppl(loaded.label, loaded.step, long_ppl.short, long_ppl.keys)
        run_on = loaded.model, loaded.groups, loaded.plan.full_attention
        facts: Any = {name: getattr(loaded, name) for name in ("label", "step", "context", "base_context")}
        facts |= {"text": evaluator.shards.fingerprint, **kept}
        if asked:
            run_retrieval(*run_on, asked, loaded.identity, Path(config.output), **facts, seed=retrieval[0].seed)
        if ruler is not None:
            facts |= {"seed": ruler.seed, "cost": cost}
            run_ruler(*run_on, riddles, loaded.identity, Path(config.output), loaded.tokenizer, **facts)
    return loaded
