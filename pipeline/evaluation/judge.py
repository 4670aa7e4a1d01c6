"""One judgement of one model: perplexity by length, the last tokens of long windows, retrieval, RULER. The same
questions for every model of one tokenizer, prepared once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.tokenizer import TextTokenizer
from pipeline.evaluation.mode import evaluating
from pipeline.evaluation.perplexity import EvalReport, cut_windows, evaluate
from pipeline.evaluation.results import CellResult, ResultFile
from pipeline.evaluation.retrieval import evaluate_retrieval
from pipeline.evaluation.ruler.results import RulerFile, RulerResult
from pipeline.evaluation.ruler.tasks import RulerCell, RulerSettings, ruler_cells
from pipeline.evaluation.run_ruler import decoder, evaluate_ruler
from pipeline.evaluation.spread import Shards
from pipeline.evaluation.tails import tail_nll
from pipeline.evaluation.tasks import Cell, RetrievalSettings, cells
from pipeline.model.rank_model import RankModel
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.reporting.metrics import json_number

TAIL_READINGS = 16
"""A tail shorter context reads is scored in steps of that context over this."""


@dataclass(frozen=True)
class JudgeSettings:
    """What is asked."""

    lengths: tuple[int, ...]
    """Context lengths of perplexity, tokens."""
    windows: int = 6
    """Windows a length."""
    tail: int = 2048
    """Last tokens of the longest windows, scored apart; 0: none."""
    retrieval: tuple[RetrievalSettings, ...] = ()
    """Grids."""
    ruler: RulerSettings | None = None
    """None: RULER is not asked."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict that tells settings apart."""
        # What was judged before RULER could be asked stays what it is.
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Judgement:
    """What was found."""

    perplexity: EvalReport
    tail_nll: tuple[float, ...]
    """Mean over the tail of each of the longest windows, nats."""
    tail_context: int
    """Tokens the model had in sight at most when it read the tail."""
    cells: tuple[CellResult, ...]
    seconds: float
    ruler: tuple[RulerResult, ...] = ()
    """A task and length each."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            "perplexity": self.perplexity.to_json(),
            "tail_nll": [json_number(value) for value in self.tail_nll],
            "tail_context": self.tail_context,
            "cells": [cell.to_json() for cell in self.cells],
            "seconds": self.seconds,
            "ruler": [cell.to_json() for cell in self.ruler],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Judgement:
        """The inverse of `to_json`; DataError, KeyError, TypeError or ValueError where it is none."""
        return cls(
            EvalReport.from_json(data["perplexity"]),
            tuple(float("nan") if value is None else float(value) for value in data["tail_nll"]),
            int(data["tail_context"]),
            tuple(CellResult.from_json(entry) for entry in data["cells"]),
            float(data["seconds"]),
            tuple(RulerResult.from_json(entry) for entry in data.get("ruler", ())),
        )


class Judge:
    """Asks every model the same.

    Args:
        settings: what is asked.
        tokenizer: of the models.
        text_T: int64 [T], held-out text.

    Raises:
        DataError: the text is too short, a prompt too long, or the tokenizer does not spell numbers alike everywhere.
    """

    def __init__(self, settings: JudgeSettings, tokenizer: TextTokenizer, text_T: NDArray[np.int64]) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.text_T = torch.from_numpy(text_T)
        self.cells: list[Cell] = [cell for grid in settings.retrieval for cell in cells(grid, tokenizer, text_T)]
        self.riddles: list[RulerCell] = []
        if settings.ruler is not None:
            self.riddles = ruler_cells(settings.ruler, tokenizer, text_T)
        self.longest = cut_windows(self.text_T, max(settings.lengths), settings.windows)

    def __call__(
        self,
        model: RankModel,
        spec: AttentionSpec,
        context: int,
        identity: Mapping[str, Any],
        known: ResultFile,
        solved: RulerFile,
        *,
        label: str,
        step: int,
        shards: Shards | None = None,
        on_windows: Callable[[int], None] = lambda count: None,
    ) -> Judgement:
        """Judge one model; collective.

        Args:
            model: in the state to be judged.
            spec: full attention.
            context: tokens the model is made for: the longest it reads a tail with.
            identity: see `evaluate_retrieval`.
            known, solved: retrieval and RULER found earlier.
            label, step: see `EvalReport`.
            shards: how windows are spread over data-parallel ranks.
            on_windows: called with a count of finished windows of retrieval and RULER.
        """
        began, asked, device = time.perf_counter(), self.settings, model.groups.device
        with evaluating(model):

            def nll(tokens_BS: torch.Tensor) -> torch.Tensor:
                return model.token_nll(tokens_BS, spec)

            perplexity = evaluate(
                nll,
                self.text_T.to(device),
                asked.lengths,
                asked.windows,
                None,
                label=label,
                step=step,
                shards=shards,
                bytes_of=lambda ids: len(self.tokenizer.decode(ids).encode()),
            )
            tails: list[float] = []
            whole = min(context, self.longest.shape[1])
            if asked.tail:
                stride = asked.tail if whole == self.longest.shape[1] else max(1, whole // TAIL_READINGS)
                windows = self.longest.to(device)
                tails = tail_nll(nll, windows, asked.tail, whole, min(stride, asked.tail), shards)
            found = evaluate_retrieval(
                lambda tokens, labels: model.token_scores(tokens, labels, spec),
                self.cells,
                identity,
                known=known,
                shards=shards,
                device=device,
                on_windows=on_windows,
            )
            answered = evaluate_ruler(
                decoder(model, spec),
                self.riddles,
                identity,
                self.tokenizer,
                known=solved,
                shards=shards,
                device=device,
                on_prompts=on_windows,
            )
        took = time.perf_counter() - began
        return Judgement(perplexity, tuple(tails), whole, tuple(found), took, tuple(answered))
