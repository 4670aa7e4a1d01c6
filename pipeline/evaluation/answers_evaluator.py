"""What `Evaluator` does for held-out text, for held-out conversations: the loss of their answers, before, during and
after training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from parallel.errors import DataError
from parallel.world.collectives import share_from_main
from parallel.world.groups import Groups
from pipeline.data.chat_settings import check_held_out, lengths_of
from pipeline.data.samples import SampleDataset
from pipeline.data.shards import TokenShards
from pipeline.evaluation.answers import AnswersReport, answers_path, measure_answers, verdict_on_answers
from pipeline.evaluation.mode import evaluating, spread_over
from pipeline.evaluation.parked import check_parked
from pipeline.model.rank_model import RankModel
from pipeline.planning.run_plan import RunPlan
from pipeline.planning.stream import prefill_cost
from pipeline.reporting.lasting import optional_file
from pipeline.reporting.progress import EvalProgress

PARTS = ("answers",)
"""As the evaluator's of text."""


class AnswersEvaluator:
    """Evaluates a model on held-out conversations under full attention; windows spread over data-parallel ranks.

    Args:
        plan, model, groups: of the run.
        shards: the prepared conversations.
        before_round: see `Shards`.

    Raises:
        ConfigError, DataError: see `check_held_out`.
    """

    def __init__(
        self,
        plan: RunPlan,
        model: RankModel,
        groups: Groups,
        shards: TokenShards,
        before_round: Callable[[], None] = lambda: None,
    ) -> None:
        self.plan, self.model, self.groups, self.shards = plan, model, groups, shards
        self._before_round, asked = before_round, plan.config.eval
        longest = int(lengths_of(shards.starts, len(shards))[: asked.conversations].max())
        check_held_out(shards.folder, longest, plan.config.model.context, asked.tasks)
        self.data = SampleDataset(shards, longest, asked.conversations)
        self._output = Path(plan.config.output)
        at_once = plan.prefill
        self._cost = None
        if at_once is not None and longest > at_once:
            self._cost = prefill_cost(plan.arch, plan.grid, longest, at_once, model.dtype.itemsize)

    def run(self, label: str, step: int, *, shown: bool = True) -> AnswersReport:
        """The loss of the answers; on rank 0 it is written to `<output>/answers-<label>.json`; collective.

        Args:
            label, step, shown: see `Evaluator.run`.
        """
        spread = spread_over(self.model, self.groups, self._before_round)
        windows = len(range(spread.rank, len(self.data), spread.world))
        progress_of = EvalProgress(windows, f"answers, {label}", enabled=shown and self.groups.is_main)
        with evaluating(self.model), progress_of as progress:
            if self._cost is not None:
                progress.say(f"answers, {label}: {self._cost.sentence}")
                mend = "prepare the conversations with a lower --max-tokens"
                check_parked(self.groups, self._cost.host, "eval.path", mend)
                self._cost = None  # once
            report = measure_answers(
                self._scores,
                self.data,
                label=label,
                step=step,
                device=self.groups.device,
                shards=spread,
                on_window=progress.advance,
            )
            progress.done = len(self.data)  # all ranks'
        if self.groups.is_main:
            path = answers_path(self._output, label)
            with optional_file(path):
                report.write(path)
        return report

    def _scores(
        self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor, documents_BS: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.token_scores(tokens_BS, labels_BS, self.plan.full_attention, documents_BS)

    def assess(
        self, label: str, step: int, *, shown: bool = True, only: Collection[str] | None = None
    ) -> AnswersReport:
        """The same, or the report that is there where `only` does not name it; collective."""
        if only is None or "answers" in only:
            return self.run(label, step, shown=shown)
        read = share_from_main(self.groups, lambda: answers_path(self._output, label).read_text())
        return AnswersReport.from_text(read, str(answers_path(self._output, label)))

    def assess_base(self) -> None:
        """The base is measured beside `eval.tasks` alone, and conversations have none."""

    def missing(self, label: str, step: int) -> tuple[str, ...]:
        """PARTS, if there is no report of this label and step on these conversations; collective."""
        return tuple(share_from_main(self.groups, lambda: self._missing(label, step)).split())

    def _missing(self, label: str, step: int) -> str:
        with contextlib.suppress(DataError):
            found = AnswersReport.read(answers_path(self._output, label))
            if found.step == step and found.fits(self.data.conversations, self.shards.fingerprint):
                return ""
        return " ".join(PARTS)

    def verdict(self) -> list[str]:
        """What training made of the answers, for rank 0, once all is measured."""
        return verdict_on_answers(self._output)
