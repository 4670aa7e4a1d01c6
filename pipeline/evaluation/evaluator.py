"""What a run's model can do: as shipped, with stretched RoPE but untrained, or trained."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from parallel.errors import DataError
from parallel.world.collectives import share_from_main
from parallel.world.groups import Groups
from pipeline.data.shards import TokenShards
from pipeline.data.tokenizer import TextTokenizer
from pipeline.evaluation.assessment import (
    Assessment,
    eval_path,
    retrieval_grids,
    verdict,
    with_further,
    within_context,
)
from pipeline.evaluation.dense_gap import DenseGap, gap_path, measure_gap
from pipeline.evaluation.long_ppl import LongPpl, long_ppl_path, measure_long_ppl
from pipeline.evaluation.mode import evaluating, spread_over
from pipeline.evaluation.parked import check_parked
from pipeline.evaluation.perplexity import EvalReport, TokenNll, cut_windows, evaluate, windows_of
from pipeline.evaluation.results import RetrievalReport, report_path
from pipeline.evaluation.ruler.cost import ruler_cost
from pipeline.evaluation.ruler.results import RulerReport, ruler_path, shipped_ruler
from pipeline.evaluation.ruler.tasks import RulerCell, RulerSettings, ruler_cells
from pipeline.evaluation.run_retrieval import run_retrieval
from pipeline.evaluation.run_ruler import run_ruler
from pipeline.evaluation.spread import Shards
from pipeline.evaluation.tasks import TASKS, Cell, RetrievalSettings, cells
from pipeline.model.rank_model import RankModel
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.run_plan import RunPlan
from pipeline.reporting.lasting import optional_file
from pipeline.reporting.progress import EvalProgress

PARTS = ("perplexity", "gap", "retrieval", "ruler")
"""Of an assessment; each has a report of its own."""
TEXT_TOKENS = 1 << 24
"""Held-out tokens read at most: far more than any number of windows a user waits for."""


class Evaluator:
    """Evaluates a model on the run's held-out text under full attention; windows spread over data-parallel ranks.

    Args:
        plan, model, groups, tokenizer: of the run.
        shards: tokens of the text.
        before_round: see `Shards`.
    """

    def __init__(
        self,
        plan: RunPlan,
        model: RankModel,
        groups: Groups,
        tokenizer: TextTokenizer,
        shards: TokenShards,
        before_round: Callable[[], None] = lambda: None,
    ) -> None:
        config = plan.config
        self.config, self.plan, self.spec = config, plan, plan.full_attention
        self._costs = plan.prefill_costs(model.dtype.itemsize)
        self._prompts: dict[RetrievalSettings, tuple[Cell, ...]] = {}
        self._riddles: dict[RulerSettings, list[RulerCell]] = {}
        self.model, self.groups, self.before_round = model, groups, before_round
        self.tokenizer = tokenizer
        self.shards = shards
        self.text_T = self.shards.read(0, min(len(self.shards), TEXT_TOKENS)).astype("int64")
        self.tokens_T = torch.from_numpy(self.text_T).to(groups.device)

    def _spread(self) -> Shards:
        return spread_over(self.model, self.groups, self.before_round)

    def run(
        self,
        label: str,
        step: int,
        *,
        shown: bool = True,
        lengths: Sequence[int] = (),
        beside: bool = False,
        model_of: str | None = None,
    ) -> EvalReport:
        """Perplexity; on rank 0 it is written to `<output>/eval-<label>.json`; collective.

        Args:
            label, step: recorded in the report.
            shown: display progress (not inside the training bar: a terminal holds one).
            lengths: tokens; empty: those of the configuration.
            beside: keep further lengths that the file holds, see `with_further`.
            model_of: `model` of the report.
        """
        settings, spread = self.config.eval, self._spread()
        lengths = lengths or self.config.eval_lengths
        windows = len(range(spread.rank, settings.windows, spread.world)) * len(lengths)
        progress_of = EvalProgress(windows, f"perplexity, {label}", enabled=shown and self.groups.is_main)
        with evaluating(self.model), progress_of as progress:
            for cost in self._costs:
                progress.say(f"perplexity, {label}: {cost.sentence}")
            if self._costs:
                parked = max(cost.host for cost in self._costs)
                check_parked(self.groups, parked, "eval.lengths", "lower the lengths")
            self._costs = ()  # once
            found = evaluate(
                self._nll(self.spec),
                self.tokens_T,
                lengths,
                settings.windows,
                settings.stride,
                label=label,
                step=step,
                shards=spread,
                on_window=progress.advance,
                bytes_of=lambda ids: len(self.tokenizer.decode(ids).encode()),
            )
            report = replace(found, text=self.shards.fingerprint, model=model_of)
            progress.done = sum(result.windows for result in report.lengths)  # all ranks'
        if self.groups.is_main:
            path = self._path(label)
            with optional_file(path):
                (with_further(report, path) if beside else report).write(path)
        return report

    def _nll(self, spec: AttentionSpec) -> TokenNll:
        return lambda tokens_BS: self.model.token_nll(tokens_BS, spec)

    def assess(
        self,
        label: str,
        step: int,
        *,
        shown: bool = True,
        within: int | None = None,
        only: Collection[str] | None = None,
    ) -> Assessment:
        """Perplexity and what `eval.tasks` asks for, of the model as it is, written beside each other; collective.

        Args:
            label, step, shown: see `run`.
            within: only lengths of no more tokens, and no dense gap; None: all.
            only: some of PARTS, see `missing`: the reports of this very model are there otherwise, and keep what is not
                asked now; None: all, and no report there counts.
        """
        parts, beside = PARTS if only is None else only, only is not None
        if "perplexity" in parts:
            lengths = within_context(self.config.eval_lengths, within)
            report = self.run(label, step, shown=shown, lengths=lengths, beside=beside)
        else:  # it is what a diverged run is known by, also where an earlier process did not come to say so
            report = EvalReport.from_json(json.loads(share_from_main(self.groups, self._path(label).read_text)))
        gap = self._gap(label, step) if "gap" in parts and self._measures_gap(within) else None
        grids = self._grids(within) if "retrieval" in parts else []
        riddles = self._ruler(within) if "ruler" in parts else None
        run_on, output = (self.model, self.groups, self.spec), Path(self.config.output)
        facts: Any = {
            "label": label,
            "step": step,
            "context": self.config.model.context,
            "base_context": self.plan.arch.max_positions,
            "text": self.shards.fingerprint,
            "shown": shown,
            "kept": False,  # the weights of a step are those of one process
            "beside": beside,
            "before_round": self.before_round,
        }
        retrieval = ruler = None
        if grids:
            prompts = [cell for grid in grids for cell in self._cells(grid)]
            retrieval = run_retrieval(*run_on, prompts, {}, output, **facts, seed=grids[0].seed)
        if riddles is not None:
            step_tokens = self.config.train.global_batch * self.config.sequence
            found, cost = self.riddles(riddles, step_tokens)
            facts |= {"seed": riddles.seed, "cost": cost}
            ruler = run_ruler(*run_on, found, {}, output, self.tokenizer, **facts)
        return Assessment(report, gap, retrieval, ruler, self._base_ruler())

    def _base_ruler(self) -> RulerReport | None:
        """RULER of the base as shipped, on rank 0; None: it was not measured."""
        return shipped_ruler(Path(self.config.output)) if self.groups.is_main else None

    def riddles(self, asked: RulerSettings, step_tokens: int | None = None) -> tuple[list[RulerCell], str]:
        """RULER's prompts, and what they cost in words; empty where that was said before.

        Args:
            step_tokens: see `RulerCost.sentence`.

        Raises:
            ConfigError: host memory has no room for the keys and values.
            DataError: see `ruler_cells`.
        """
        if asked in self._riddles:
            return self._riddles[asked], ""
        self._riddles[asked] = found = ruler_cells(asked, self.tokenizer, self.text_T)
        cost = ruler_cost(found, self.plan.arch, self.plan.grid, self.model.dtype.itemsize)
        check_parked(self.groups, cost.host, "RULER", "lower its lengths (eval.ruler_lengths, --lengths)")
        return found, cost.sentence(step_tokens)

    def _gap(self, label: str, step: int) -> DenseGap:
        """The dense gap, written as `<output>/gap-<label>.json`."""
        windows = cut_windows(self.tokens_T, self.config.sequence, self.config.eval.windows)
        with evaluating(self.model):
            pair = self._nll(self.plan.attention), self._nll(self.spec)
            text, shards = self.shards.fingerprint, self._spread()
            gap = measure_gap(*pair, windows, label=label, step=step, text=text, shards=shards)
        if self.groups.is_main:
            path = gap_path(Path(self.config.output), label)
            with optional_file(path):
                gap.write(path)
        return gap

    def measure_long_ppl(self, label: str, step: int, short: int, keys: LongPpl | None) -> LongPpl:
        """LongPPL of the longest windows, written as `<output>/longppl-<label>.json`; see `long_ppl`."""
        windows = cut_windows(self.tokens_T, max(self.config.eval_lengths), self.config.eval.windows)
        with evaluating(self.model):
            found = measure_long_ppl(
                self._nll(self.spec), windows, short, keys, label=label, step=step, shards=self._spread()
            )
        if self.groups.is_main:
            path = long_ppl_path(Path(self.config.output), label)
            with optional_file(path):
                found.write(path)
            print(found.sentence, flush=True)
        return found

    def _grids(self, within: int | None) -> list[RetrievalSettings]:
        """Of retrieval, in windows of no more tokens than `within`; None: all."""
        asked = self.config.eval
        names = [task for task in asked.tasks if task in TASKS]
        lengths = within_context(self.config.retrieval_lengths, within)
        return retrieval_grids(asked, names, lengths) if lengths else []

    def _ruler(self, within: int | None) -> RulerSettings | None:
        """RULER, in windows of no more tokens than `within` (None: all); None: not asked for."""
        tasks, lengths = self.config.ruler_tasks, within_context(self.config.ruler_lengths, within)
        return RulerSettings(tasks, lengths, self.config.ruler_prompts) if tasks and lengths else None

    def _cells(self, grid: RetrievalSettings) -> Sequence[Cell]:
        """Prompts of a grid, made once: a run asks the same at every evaluation."""
        if grid not in self._prompts:
            self._prompts[grid] = tuple(cells(grid, self.tokenizer, self.text_T))
        return self._prompts[grid]

    def assess_base(self, *, shown: bool = True) -> None:
        """Measure the base at the lengths that it was made for, unless that is there already; collective.

        The model must still have the base's weights: only its positions are another's.
        """
        own = self.plan.arch.max_positions
        if not self.config.eval.tasks or not within_context(self.config.eval_lengths, own):
            return
        if missing := self.missing("shipped", 0):
            with self.model.positioned(self.plan.as_shipped().rope):
                self.assess("shipped", 0, shown=shown, within=own, only=missing)

    def verdict(self) -> list[str]:
        """What was lost within the base's own context, one sentence each; for rank 0, once all is measured."""
        if not self.config.eval.tasks:
            return []
        said = verdict(Path(self.config.output), self.plan.arch.max_positions)
        if self._path("shipped").exists() and self._missing("shipped", 0):
            said.append(
                "the base was not asked all that is asked now; `longspan evaluate --state shipped` with this file and "
                "the same --tasks asks it, and this command, rerun, compares."
            )
        return said

    def missing(self, label: str, step: int) -> tuple[str, ...]:
        """Which of PARTS have no whole report of this label and step that answers what the configuration asks now;
        collective, alike on every rank."""
        return tuple(share_from_main(self.groups, lambda: " ".join(self._missing(label, step))).split())

    def _missing(self, label: str, step: int) -> list[str]:
        """`missing`, as this rank sees it."""
        asked, output, text = self.config.eval, Path(self.config.output), self.shards.fingerprint
        # The base is measured within its own context alone.
        within = self.plan.arch.max_positions if label == "shipped" else None
        lengths, grids = within_context(self.config.eval_lengths, within), self._grids(within)

        def reads_alike(report: EvalReport) -> bool:
            windows = windows_of(self.tokens_T, lengths, asked.windows, asked.stride)
            return report.answers(windows, asked.stride, text)

        def has_gap(gap: DenseGap) -> bool:
            windows = min(asked.windows, len(self.tokens_T) // self.config.sequence)
            return gap.answers(self.config.sequence, windows, text)

        wanted: list[tuple[str, Any, Path, Callable[[Any], bool]]] = [
            ("perplexity", EvalReport, self._path(label), reads_alike)
        ]
        if self._measures_gap(within):
            wanted.append(("gap", DenseGap, gap_path(output, label), has_gap))
        if grids:
            path = report_path(output, label)
            wanted.append(("retrieval", RetrievalReport, path, lambda report: report.answers(grids, text)))
        if (riddles := self._ruler(within)) is not None:
            path = ruler_path(output, label)
            wanted.append(("ruler", RulerReport, path, lambda report: report.answers(riddles, text)))
        missing: list[str] = []
        for part, kind, path, answers in wanted:
            with contextlib.suppress(DataError):
                found = kind.read(path)
                # Of what text a report without a fingerprint is, only that of perplexity can tell.
                if found.step == step and answers(found) and ("perplexity" not in missing or found.text):
                    continue
            missing.append(part)
        return missing

    def _measures_gap(self, within: int | None) -> bool:
        """Whether the dense gap is asked for, and can be: only of windows as long as those of training."""
        return "dense_gap" in self.config.eval.tasks and self.config.attention.kind != "full" and within is None

    def _path(self, label: str) -> Path:
        return eval_path(Path(self.config.output), label)
