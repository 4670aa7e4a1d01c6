"""LongPPL (arXiv 2410.23771): perplexity over the tokens that a long context helps with, its key tokens, alone.

A token is key if the long context raises its log-likelihood by more than `GAIN` over a short context, and it is read
well then: log-likelihood above `LEAST` (the paper's thresholds). Whose likelihoods decide is free: one model's keys can
judge others of its tokenizer.

Shapes: W windows, S tokens of a window, K tokens of the short context.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parallel.errors import ConfigError, DataError
from pipeline.evaluation.perplexity import TokenNll, exponential
from pipeline.evaluation.spread import Shards, turns
from pipeline.evaluation.tails import tail_spans
from pipeline.reporting.metrics import json_number
from pipeline.storage.json_file import replace_json

GAIN, LEAST = 2.0, -2.0
"""Nats: what the long context brings at least, and the log-likelihood under it."""
SHORT = 4096
"""Tokens of the short context, as in the paper."""
READINGS = 4
"""The short context moves on by its length over this: a token has at least three quarters of it before itself."""


@dataclass(frozen=True)
class LongPpl:
    """LongPPL of one model."""

    label: str
    """As in `EvalReport`."""
    step: int
    length: int
    """Tokens of a window."""
    short: int
    """Tokens of the short context."""
    text: str
    """sha256 of the windows' tokens."""
    keys: tuple[tuple[int, ...], ...]
    """Positions of the key tokens in each window, ascending."""
    nll: float
    """Mean over the key tokens, nats; NaN: there are none."""

    @property
    def sentence(self) -> str:
        """A line for the display."""
        count = sum(map(len, self.keys))
        found = "no token is key" if not count else f"{self.perplexity:.2f} over {count:,} key tokens"
        return f"LongPPL, {self.label}: {found} in windows of {self.length} (short context: {self.short})"

    @property
    def perplexity(self) -> float:
        """exp of the mean; NaN: no token is key."""
        return math.nan if math.isnan(self.nll) else exponential(self.nll)

    def write(self, path: Path) -> None:
        """Write as JSON; OSError if the disk refuses."""
        facts = {name: getattr(self, name) for name in ("label", "step", "length", "short", "text")}
        data = {**facts, "nll": json_number(self.nll), "perplexity": json_number(self.perplexity), "keys": self.keys}
        replace_json(path, data, indent=None)

    @classmethod
    def read(cls, path: Path) -> LongPpl:
        """Read what `write` wrote.

        Raises:
            DataError: the file is missing or is none of these.
        """
        try:
            data: Mapping[str, Any] = json.loads(path.read_text())
            keys = tuple(tuple(int(at) for at in row) for row in data["keys"])
            step, length, short = (int(data[name]) for name in ("step", "length", "short"))
            nll = math.nan if data["nll"] is None else float(data["nll"])
            return cls(str(data["label"]), step, length, short, str(data["text"]), keys, nll)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: is no LongPPL report ({type(error).__name__}: {error}); measure again.") from None


@dataclass(frozen=True)
class LongPplAsked:
    """How LongPPL is to be measured."""

    short: int
    """Tokens of the short context."""
    keys: LongPpl | None
    """Whose key tokens are taken; None: the model's own."""


def long_ppl_path(output: Path, label: str) -> Path:
    """Where the LongPPL of a label lies."""
    return output / f"longppl-{label}.json"


def measure_long_ppl(
    nll: TokenNll,
    windows_WS: torch.Tensor,
    short: int,
    keys: LongPpl | None,
    *,
    label: str,
    step: int,
    shards: Shards | None = None,
) -> LongPpl:
    """LongPPL by the model's own key tokens, or by another's.

    Args:
        nll: the model, under full attention.
        windows_WS: int64 [W, S].
        short: K; that of the keys where they are given.
        keys: of these windows; None: the model's own are found.
        label, step: recorded.
        shards: how windows are spread over data-parallel ranks.

    Raises:
        ConfigError: windows no longer than the short context have no key tokens.
        DataError: the keys are of other windows.
    """
    shards = shards or Shards()
    count, length = windows_WS.shape
    short = short if keys is None else keys.short
    stride = max(1, short // READINGS)
    if length <= short or short < 2:
        raise ConfigError(f"longppl: windows of {length} tokens are no longer than the short context of {short}.")
    text = hashlib.sha256(windows_WS.cpu().numpy().astype("<i8").tobytes()).hexdigest()
    if keys is not None and (keys.text, keys.length) != (text, length):
        raise DataError(
            f"--keys: are of other text or windows than these {count} of {length} tokens; find them with the same "
            "held-out text, tokenizer, lengths and number of windows."
        )
    # Of each position: its loss with all before it, and with the short context (0 where that is the same).
    table = torch.zeros(2, count, length, dtype=torch.float64, device=windows_WS.device)
    for index, mine in turns(count, shards):
        window, scored = windows_WS[index], short
        whole = nll(window.unsqueeze(0))[0].double()
        table[0, index, 1:] = whole if mine else 0.0
        for begin, end in (
            tail_spans(length, length - short, short, min(stride, length - short)) if keys is None else ()
        ):
            part = nll(window[begin:end].unsqueeze(0))[0, -(end - scored) :].double()
            table[1, index, scored:end] = part if mine else 0.0
            scored = end
    long_nll, short_nll = shards.all_reduce_sum(table).cpu()
    if keys is None:
        chosen = (short_nll - long_nll > GAIN) & (-long_nll > LEAST)
        chosen[:, :short] = False
        found = tuple(tuple(row.nonzero().flatten().tolist()) for row in chosen)
    else:
        found = keys.keys
    losses = [float(long_nll[row, at]) for row, positions in enumerate(found) for at in positions]
    mean = sum(losses) / len(losses) if losses else math.nan
    return LongPpl(label, step, length, short, text, found, mean)
