"""Answers of held-out conversations: the loss over their scored tokens under full attention, each conversation seeing
itself only, as in training.

Conversations are packed into windows as long as the longest of them; the result is that of each conversation alone. A
forward also tells which answers greedy decoding would give word for word, see `RankModel.token_scores`.

Shapes: S tokens of a window, C conversations.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parallel.errors import DataError
from pipeline.data.packing import IGNORE
from pipeline.data.samples import SampleDataset
from pipeline.evaluation.perplexity import exponential
from pipeline.evaluation.spread import Shards, turns
from pipeline.reporting.metrics import json_number
from pipeline.reporting.words import counted
from pipeline.storage.json_file import replace_json

AnswerScores = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""int64 tokens [1, S], int64 labels [1, S], int32 documents [1, S] -> fp32 [1, S - 1] nats, bool [1, S - 1] whether the
label is the arg max."""
BEGUN = {"untrained": "before training", "initial": "of what it began with", "shipped": "as shipped"}
"""What a trained model is compared with, by label: whichever is there first."""
_LISTS = ("tokens", "conversation_nll", "right")


@dataclass(frozen=True)
class AnswersReport:
    """One evaluation of one model on held-out conversations."""

    label: str
    """As in `EvalReport`."""
    step: int
    """Optimizer steps the model was trained for."""
    length: int
    """Tokens of the longest conversation."""
    tokens: tuple[int, ...]
    """Scored tokens of each conversation."""
    conversation_nll: tuple[float, ...]
    """Mean negative log-likelihood over the scored tokens of each conversation, nats."""
    right: tuple[int, ...]
    """Scored tokens of each conversation that are the arg max."""
    seconds: float
    """Wall time of the evaluation."""
    text: str
    """Fingerprint of the held-out conversations."""

    @property
    def scored(self) -> int:
        """Scored tokens of all conversations."""
        return sum(self.tokens)

    @property
    def nll(self) -> float:
        """Mean over all scored tokens, nats: the loss, as training counts it."""
        return weighted_mean(self.conversation_nll, self.tokens)

    @property
    def nll_stderr(self) -> float | None:
        """Standard error of `nll` over conversations; None: there is one."""
        return weighted_error(self.conversation_nll, self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return exponential(self.nll)

    @property
    def exact(self) -> float:
        """Share of the conversations all of whose scored tokens greedy decoding gives."""
        return sum(map(int.__eq__, self.right, self.tokens)) / len(self.tokens)

    @property
    def lengths(self) -> tuple[AnswersReport, ...]:
        """Losses by length, as a session asks: of conversations there is one."""
        return (self,)

    @property
    def points(self) -> dict[str, float]:
        """Figures to plot, by name."""
        return {"answers/loss": self.nll, "answers/perplexity": self.perplexity, "answers/exact": self.exact}

    @property
    def sentences(self) -> list[str]:
        """Lines for the display."""
        return [
            f"answers, {self.label}: loss {self.nll:.4f}, perplexity {self.perplexity:.4g}, word for word "
            f"{self.exact:.0%} ({counted(len(self.tokens), 'conversation', grouped=True)}, "
            f"{counted(self.scored, 'scored token', grouped=True)})"
        ]

    def fits(self, conversations: int, text: str) -> bool:
        """Whether it is of these conversations, and of so many."""
        return (len(self.tokens), self.text) == (conversations, text)

    def write(self, path: Path) -> None:
        """Write as JSON, in one step, with the means for the reader; OSError if the disk refuses."""
        facts = {
            name: getattr(self, name) for name in ("label", "step", "length", "seconds", "text", "scored", "exact")
        }
        means = {name: json_number(getattr(self, name)) for name in ("nll", "nll_stderr", "perplexity")}
        lists = {name: list(getattr(self, name)) for name in _LISTS}
        lists["conversation_nll"] = [json_number(nll) for nll in self.conversation_nll]
        replace_json(path, {**facts, "conversations": len(self.tokens), **means, **lists})

    @classmethod
    def read(cls, path: Path) -> AnswersReport:
        """Read what `write` wrote.

        Raises:
            DataError: the file is missing or is none of these.
        """
        try:
            return cls.from_text(path.read_text(), str(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); evaluate again.") from None

    @classmethod
    def from_text(cls, text: str, where: str) -> AnswersReport:
        """What a file of that text holds; DataError: no report."""
        try:
            data: Mapping[str, Any] = json.loads(text)
            tokens, right = (tuple(int(count) for count in data[name]) for name in ("tokens", "right"))
            nll = tuple(math.nan if value is None else float(value) for value in data["conversation_nll"])
            if not len(tokens) == len(right) == len(nll) or min(tokens, default=0) < 1:
                raise ValueError("as many counts as losses, one at least")
            facts = str(data["label"]), int(data["step"]), int(data["length"])
            return cls(*facts, tokens, nll, right, float(data["seconds"]), str(data["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{where}: is no report on answers ({type(error).__name__}: {error}); evaluate again."
            ) from None


def answers_path(output: Path, label: str) -> Path:
    """Where the report of a label lies."""
    return output / f"answers-{label}.json"


def weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    """Mean of values that stand for so many tokens each."""
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def weighted_error(values: Sequence[float], weights: Sequence[int]) -> float | None:
    """Standard error of `weighted_mean` where each value, with all its tokens, is one draw (ratio estimate; W. G.
    Cochran, Sampling Techniques, 1977, 6.3); None: there is one value."""
    count = len(values)
    if count < 2:
        return None
    mean = weighted_mean(values, weights)
    squares = math.fsum((weight * (value - mean)) ** 2 for value, weight in zip(values, weights, strict=True))
    return math.sqrt(squares * count / (count - 1)) / sum(weights)


def compared(before: AnswersReport, after: AnswersReport, when: str = "before training") -> str:
    """A sentence on what became of the answers; empty: the reports are of other conversations.

    Args:
        when: the earlier of the two was made.
    """
    if (before.text, before.tokens) != (after.text, after.tokens):
        return ""
    differences = [b - a for a, b in zip(before.conversation_nll, after.conversation_nll, strict=True)]
    change, error = weighted_mean(differences, after.tokens), weighted_error(differences, after.tokens)
    doubt = "" if error is None else f" ± {error:.4f}"
    verdict = "better" if change < 0 else "worse"
    if error is not None and abs(change) <= 2 * error:
        verdict = f"{verdict}, which may be chance"
    conversations = counted(len(after.tokens), "held-out conversation", grouped=True)
    return (
        f"answers of {conversations}: a loss of {before.nll:.4f} {when} and of {after.nll:.4f} now "
        f"({change:+.4f}{doubt} nats a token: {verdict}), perplexity {before.perplexity:.4g} and "
        f"{after.perplexity:.4g}, word for word {before.exact:.0%} and {after.exact:.0%}."
    )


def verdict_on_answers(output: Path) -> list[str]:
    """What a finished run made of the answers on held-out conversations, from its reports: one sentence, or none.

    Args:
        output: the run's folder.
    """
    for label, when in BEGUN.items():
        with contextlib.suppress(DataError):
            before, after = (AnswersReport.read(answers_path(output, name)) for name in (label, "after"))
            if said := compared(before, after, when):
                return [said]
    return []


def measure_answers(
    scores: AnswerScores,
    data: SampleDataset,
    *,
    label: str,
    step: int,
    device: torch.device,
    shards: Shards | None = None,
    on_window: Callable[[], None] = lambda: None,
) -> AnswersReport:
    """Score the answers of all conversations.

    Args:
        scores: the model, under full attention.
        data: windows of the conversations.
        label, step: recorded.
        device: where the model wants its tokens.
        shards: this rank's share of the windows.
        on_window: called after each of this rank's windows.
    """
    began, shards = time.perf_counter(), shards or Shards()
    conversations = [data.documents(index) for index in range(len(data))]
    # Of each conversation: the sum of its losses, its scored tokens, and how many of them are right.
    table = np.zeros((3, sum(map(len, conversations))))
    for index, mine in turns(len(data), shards):
        window, numbers = data.window(index), np.array(conversations[index])
        size = int(np.searchsorted(window.document_ids, len(numbers)))  # without the padding
        rows = (window.tokens[:size], window.labels[:size], window.document_ids[:size])
        tokens, labels, documents = (torch.from_numpy(row)[None] for row in rows)
        nll, hits = scores(tokens.to(device), labels.to(device), documents)
        if not mine:
            continue
        scored = rows[1][:-1] != IGNORE
        whose = numbers[rows[2][:-1][scored]]
        for row, values in enumerate((nll[0].double().cpu().numpy()[scored], None, hits[0].cpu().numpy()[scored])):
            table[row] += np.bincount(whose, values, table.shape[1])
        on_window()
    sums, counts, right = shards.all_reduce_sum(torch.from_numpy(table).to(device)).cpu().tolist()
    return AnswersReport(
        label,
        step,
        data.longest,
        tuple(int(count) for count in counts),
        tuple(total / count for total, count in zip(sums, counts, strict=True)),
        tuple(int(count) for count in right),
        time.perf_counter() - began,
        data.shards.fingerprint,
    )
