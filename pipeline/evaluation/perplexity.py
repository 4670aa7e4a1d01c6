"""Perplexity under full attention: whole windows or a sliding window, by context length and by position in the window.

A model is only a function here, `nll(tokens int64 [B, S]) -> fp32 [B, S-1]`: negative log-likelihoods in nats of tokens
1..S-1 given those before them in the window. Windows go through it one at a time, so memory is that of one sequence;
sums are fp64. Every rank fills its own windows' rows of one table whose other rows are zero, so that the summed table,
and all that is computed from it, equals one process's bit for bit whatever the number of ranks.

Shapes: W windows, S tokens of a window, T tokens of a text.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from parallel.errors import DataError
from pipeline.evaluation.spread import Shards, turns
from pipeline.reporting.metrics import json_number
from pipeline.storage.json_file import replace_json

TokenNll = Callable[[torch.Tensor], torch.Tensor]
"""int64 [B, S] -> fp32 [B, S-1], nats."""

POSITION_BLOCKS = 16
"""Blocks the longest context is cut into when no block size is given."""


def exponential(nll: float) -> float:
    """Perplexity of a mean negative log-likelihood in nats; infinity where fp64 has no number for it."""
    return math.exp(nll) if not nll > 700 else math.inf


@dataclass(frozen=True)
class LengthResult:
    """Perplexity at one context length."""

    length: int
    """Context length, tokens."""
    windows: int
    tokens: int
    """Tokens scored."""
    nll: float
    """Mean negative log-likelihood over all scored tokens, nats."""
    nll_stderr: float | None
    """Standard error of the windows' mean nll (sample deviation / sqrt(windows)); None for a single window. Windows of
    one text are not independent, so this is a lower estimate."""
    block: int
    """Tokens of a position block."""
    block_nll: tuple[float | None, ...]
    """Mean nll of the tokens at window positions [b * block, (b + 1) * block), over all windows; None: no token."""
    block_tokens: tuple[int, ...]
    window_nll: tuple[float, ...] = ()
    """Mean nll of each window, in order: for differences between models on the same windows. Empty in old reports."""
    bytes: int | None = None
    """UTF-8 bytes of the scored tokens' text (a character cut in two counts as U+FFFD); None: not counted."""

    @property
    def perplexity(self) -> float:
        """exp of the mean nll."""
        return exponential(self.nll)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits needed for a byte of the text: comparable between tokenizers, as perplexity is not."""
        return self.nll * self.tokens / math.log(2) / self.bytes if self.bytes else None

    @property
    def block_perplexity(self) -> tuple[float | None, ...]:
        """Perplexity of each position block."""
        return tuple(None if nll is None else exponential(nll) for nll in self.block_nll)


@dataclass(frozen=True)
class EvalReport:
    """One evaluation of one model."""

    label: str
    """E.g. before, untrained, after, step-000050."""
    step: int
    """Optimizer steps the model was trained for."""
    stride: int | None
    """Sliding-window stride, tokens; None: whole windows."""
    lengths: tuple[LengthResult, ...]
    seconds: float
    """Wall time of the evaluation."""
    text: str | None = None
    """Fingerprint of the held-out tokens; None: an earlier release did not note it."""
    model: str | None = None
    """See `kept.same_model`."""

    def answers(self, windows: Mapping[int, int], stride: int | None, text: str) -> bool:
        """Whether this is what would be found now.

        Args:
            windows: by length, see `windows_of`.
            stride, text: see this class.
        """
        found = {result.length: result.windows for result in self.lengths}
        alike = all(found.get(length) == count for length, count in windows.items())
        return alike and self.stride == stride and self.text in (None, text)

    @property
    def perplexity(self) -> dict[int, float]:
        """Perplexity by context length."""
        return {result.length: result.perplexity for result in self.lengths}

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; perplexities are added for the reader, NaN and infinities are null."""
        data = asdict(self)
        for entry, result in zip(data["lengths"], self.lengths, strict=True):
            entry["nll"], entry["nll_stderr"] = json_number(result.nll), json_number(result.nll_stderr)
            entry["perplexity"] = json_number(result.perplexity)
            entry["bits_per_byte"] = json_number(result.bits_per_byte)
            entry["block_nll"] = [json_number(nll) for nll in result.block_nll]
            entry["block_tokens"] = list(result.block_tokens)
            entry["window_nll"] = [json_number(nll) for nll in result.window_nll]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "evaluation") -> EvalReport:
        """The inverse of `to_json`, except that a non-finite mean comes back as NaN.

        Raises:
            DataError: a field is missing or malformed.
        """
        try:
            names = [field.name for field in fields(LengthResult)]
            results = []
            for entry in data["lengths"]:
                values = {"window_nll": (), "bytes": None, **entry}
                values = {name: values[name] for name in names}
                values["nll"] = math.nan if values["nll"] is None else float(values["nll"])
                values["window_nll"] = tuple(math.nan if nll is None else float(nll) for nll in values["window_nll"])
                for name in ("block_nll", "block_tokens"):
                    values[name] = tuple(values[name])
                results.append(LengthResult(**values))
            facts = data["label"], int(data["step"]), data["stride"], tuple(results), float(data["seconds"])
            return cls(*facts, data.get("text"), data.get("model"))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}: is not an evaluation report ({type(error).__name__}: {error}); evaluate again."
            ) from None

    def write(self, path: Path) -> None:
        """Write as JSON, in one step; OSError if the disk refuses."""
        replace_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> EvalReport:
        """Read what `write` wrote.

        Raises:
            DataError: the file is missing or is not an evaluation report.
        """
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as JSON ({error}); evaluate again.") from None
        return cls.from_json(data, str(path))


def cut_windows(tokens_T: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """`count` windows of `length` tokens, spread evenly over a text, never overlapping; fewer if it holds fewer.

    Args:
        tokens_T: int64 [T].

    Returns:
        int64 [W, S], W = min(count, T // length).

    Raises:
        DataError: the text is shorter than one window.
    """
    windows = min(count, tokens_T.numel() // length)
    if windows == 0:
        raise DataError(
            f"Evaluation text: has {tokens_T.numel()} tokens, fewer than one window of {length}; give a longer text in "
            "eval.path, or lower eval.lengths."
        )
    gap = (tokens_T.numel() - windows * length) // windows
    return torch.stack([tokens_T[i * (length + gap) :][:length] for i in range(windows)])


def sliding_spans(tokens: int, length: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows of `sliding_window` over a text of `tokens` tokens.

    Returns:
        (begin, end, first) a window: it holds tokens [begin, end), and [first, end) are scored.
    """
    if not 1 <= stride <= length or length < 2:
        raise ValueError(f"stride {stride} does not lie in [1, length {length}], or the length is below 2")
    spans, scored = [], 0
    for begin in range(0, tokens, stride):
        end = min(begin + length, tokens)
        first = max(scored, begin + 1)  # a window's first token has nothing before it
        if first < end:
            spans.append((begin, end, first))
        scored = end
        if end == tokens:
            break
    return spans


def whole_windows(
    nll: TokenNll,
    tokens_WS: torch.Tensor,
    block: int | None = None,
    shards: Shards | None = None,
    on_window: Callable[[], None] = lambda: None,
) -> LengthResult:
    """Score tokens 1..S-1 of every window.

    Args:
        nll: the model.
        tokens_WS: int64 [W, S], on the device the model and the reduction want.
        block: tokens of a position block; None cuts the window into POSITION_BLOCKS.
        shards: this rank's share.
        on_window: called after each of this rank's windows.
    """
    count, length = tokens_WS.shape
    spans = [(tokens_WS[i], 1) for i in range(count)]
    return _score(nll, spans, length, block, shards or Shards(), on_window)


def sliding_window(
    nll: TokenNll,
    tokens_T: torch.Tensor,
    length: int,
    stride: int,
    block: int | None = None,
    shards: Shards | None = None,
    on_window: Callable[[], None] = lambda: None,
) -> LengthResult:
    """Score every token of a text once, each but the first `length` with at least `length - stride` tokens before it.

    Window k holds tokens [k * stride, k * stride + length), cut at the end of the text; the last window is the first to
    reach it. The first window is scored whole (its token 0 cannot be: nothing stands before it), every later one only
    on the tokens no window before it held: its last `stride`, or what the text has left. This is the strided perplexity
    of the Hugging Face guide ("Perplexity of fixed-length models"), as LongLoRA reports it. With stride = length,
    windows do not overlap and the first token of each is not scored. Block positions count from the window's start.

    Args:
        nll: the model.
        tokens_T: int64 [T], T >= 2, on the device the model and the reduction want.
        length: window, tokens.
        stride: tokens between windows, 1 <= stride <= length.
        block, shards, on_window: as for `whole_windows`.

    Raises:
        DataError: the text has nothing to score.
    """
    spans = [
        (tokens_T[begin:end], first - begin) for begin, end, first in sliding_spans(tokens_T.numel(), length, stride)
    ]
    if not spans:
        raise DataError(f"Evaluation text: has {tokens_T.numel()} tokens, and two are the least; give a longer one.")
    return _score(nll, spans, length, block, shards or Shards(), on_window)


def _score(
    nll: TokenNll,
    spans: Sequence[tuple[torch.Tensor, int]],
    length: int,
    block: int | None,
    shards: Shards,
    on_window: Callable[[], None],
) -> LengthResult:
    """Sum token losses a window and position block into a table [W, 2, blocks] of (sums, counts), then over ranks.

    Args:
        spans: (tokens [S], first scored position) a window.
    """
    block = block or math.ceil(length / POSITION_BLOCKS)
    blocks = math.ceil(length / block)
    table = torch.zeros(len(spans), 2, blocks, dtype=torch.float64, device=spans[0][0].device)
    for index, mine in turns(len(spans), shards):
        tokens_S, first = spans[index]
        losses = nll(tokens_S.unsqueeze(0))
        if not mine:
            continue
        if losses.shape != (1, tokens_S.numel() - 1):
            raise ValueError(f"nll returned {tuple(losses.shape)} for {tokens_S.numel()} tokens")
        positions = torch.zeros(2, blocks * block, dtype=torch.float64, device=table.device)
        positions[0, first : tokens_S.numel()] = losses[0, first - 1 :].to(positions)
        positions[1, first : tokens_S.numel()] = 1.0
        table[index] = positions.view(2, blocks, block).sum(dim=2)
        on_window()
    return _summarize(shards.all_reduce_sum(table).cpu(), length, block)


def _summarize(table: torch.Tensor, length: int, block: int) -> LengthResult:
    """Means and their spread from the whole table, fp64 [W, 2, blocks]."""
    window_sums, window_counts = table.sum(dim=2).unbind(dim=1)
    windows, tokens = table.shape[0], int(window_counts.sum())
    means = window_sums / window_counts
    block_sums, block_counts = table.sum(dim=0).tolist()
    return LengthResult(
        length=length,
        windows=windows,
        tokens=tokens,
        nll=float(window_sums.sum()) / tokens,
        nll_stderr=float(means.std(correction=1)) / math.sqrt(windows) if windows > 1 else None,
        block=block,
        block_nll=tuple(s / n if n else None for s, n in zip(block_sums, block_counts, strict=True)),
        block_tokens=tuple(int(n) for n in block_counts),
        window_nll=tuple(means.tolist()),
    )


def _scored_bytes(
    tokens: torch.Tensor, stride: int | None, length: int, bytes_of: Callable[[Sequence[int]], int]
) -> int:
    """UTF-8 bytes of the tokens that are scored in windows [W, S], or in a text [T] read with a stride."""
    if stride is None:
        spans = [(row.tolist(), 1) for row in tokens]
    else:
        text = tokens.tolist()
        spans = [(text[begin:end], first - begin) for begin, end, first in sliding_spans(len(text), length, stride)]
    # As a difference: what a text begins with may be written otherwise than the same in its middle.
    return sum(bytes_of(span) - bytes_of(span[:first]) for span, first in spans)


def plan_lengths(
    tokens_T: torch.Tensor, lengths: Sequence[int], windows: int, stride: int | None
) -> Iterator[tuple[int, torch.Tensor]]:
    """(length, tokens) to evaluate: windows [W, S], or with a stride the text [T] that `windows` sliding ones cover."""
    for length in sorted(set(lengths)):
        cut = cut_windows(tokens_T, length, 1 if stride is not None else windows)
        yield length, cut if stride is None else tokens_T[: length + (windows - 1) * stride]


def windows_of(tokens_T: torch.Tensor, lengths: Sequence[int], windows: int, stride: int | None) -> dict[int, int]:
    """By length, the windows that `evaluate` reads, whose arguments these are.

    Raises:
        DataError: the text is shorter than a length.
    """
    return {
        length: len(tokens) if stride is None else len(sliding_spans(len(tokens), length, stride))
        for length, tokens in plan_lengths(tokens_T, lengths, windows, stride)
    }


def evaluate(
    nll: TokenNll,
    tokens_T: torch.Tensor,
    lengths: Sequence[int],
    windows: int,
    stride: int | None,
    *,
    label: str,
    step: int,
    shards: Shards | None = None,
    on_window: Callable[[], None] = lambda: None,
    bytes_of: Callable[[Sequence[int]], int] | None = None,
) -> EvalReport:
    """Perplexity of a text at several context lengths; every length uses the same position-block size.

    Lengths see different tokens of the text: windows are spread over it, or start at its beginning with a stride.
    Compare models at one length; between lengths the text differs too.

    Args:
        nll: the model, under full attention.
        tokens_T: int64 [T], held-out text.
        lengths: context lengths, tokens.
        windows: windows a length.
        stride: None scores whole windows; otherwise see `sliding_window`.
        label, step: recorded in the report.
        shards, on_window: as for `whole_windows`.
        bytes_of: counts the UTF-8 bytes of tokens' text, for bits a byte.

    Raises:
        DataError: the text is shorter than a context length.
    """
    began = time.perf_counter()
    block = math.ceil(max(lengths) / POSITION_BLOCKS)
    results = []
    for length, tokens in plan_lengths(tokens_T, lengths, windows, stride):
        if stride is None:
            result = whole_windows(nll, tokens, block, shards, on_window)
        else:
            result = sliding_window(nll, tokens, length, stride, block, shards, on_window)
        results.append(
            result if bytes_of is None else replace(result, bytes=_scored_bytes(tokens, stride, length, bytes_of))
        )
    return EvalReport(label, step, stride, tuple(results), time.perf_counter() - began)
