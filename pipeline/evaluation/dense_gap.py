"""The dense gap: what full attention, which a model is used with, loses on the very same windows against the attention
that it is trained with.

Training with S² lowers the loss under S². Where that under full attention stays above it, the last steps should train
with full attention (`attention.full_last_steps`).

Shapes: W windows, S tokens of a window.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parallel.errors import DataError
from pipeline.evaluation.perplexity import TokenNll, whole_windows
from pipeline.evaluation.spread import Shards
from pipeline.reporting.metrics import json_number
from pipeline.storage.json_file import replace_json


@dataclass(frozen=True)
class DenseGap:
    """Losses of the same windows under both attentions."""

    label: str
    """As in `EvalReport`."""
    step: int
    """Optimizer steps the model was trained for."""
    length: int
    """Tokens of a window: the training sequence."""
    sparse_nll: tuple[float, ...]
    """Mean of each window under training attention, nats."""
    dense_nll: tuple[float, ...]
    """Mean of each window under full attention, nats."""
    text: str | None = None
    """Fingerprint of the held-out tokens; None: an earlier release did not note it."""

    def answers(self, length: int, windows: int, text: str) -> bool:
        """Whether so many windows of that length were read, of a text of that fingerprint."""
        return (self.length, len(self.sparse_nll)) == (length, windows) and self.text in (None, text)

    @property
    def differences(self) -> list[float]:
        """Of each window, dense less sparse, nats: above 0, full attention reads worse."""
        return [dense - sparse for dense, sparse in zip(self.dense_nll, self.sparse_nll, strict=True)]

    @property
    def mean(self) -> float:
        """Mean of `differences`."""
        return sum(self.differences) / len(self.differences)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; NaN and infinities are null."""
        values = {name: [json_number(nll) for nll in getattr(self, name)] for name in ("sparse_nll", "dense_nll")}
        facts = {"label": self.label, "step": self.step, "length": self.length, "text": self.text}
        return {**facts, **values, "mean": json_number(self.mean)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DenseGap:
        """The inverse of `to_json`; KeyError, TypeError or ValueError where it is none."""
        sparse, dense = (
            tuple(float("nan") if nll is None else float(nll) for nll in data[name])
            for name in ("sparse_nll", "dense_nll")
        )
        if not sparse or len(sparse) != len(dense):
            raise ValueError("as many windows under both attentions, one at least")
        return cls(str(data["label"]), int(data["step"]), int(data["length"]), sparse, dense, data.get("text"))

    def write(self, path: Path) -> None:
        """Write as JSON; OSError if the disk refuses."""
        replace_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> DenseGap:
        """Read what `write` wrote.

        Raises:
            DataError: the file is missing or is none of these.
        """
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: is no dense gap ({type(error).__name__}: {error}); evaluate again.") from None


def gap_path(output: Path, label: str) -> Path:
    """Where the gap of a label lies."""
    return output / f"gap-{label}.json"


def measure_gap(
    sparse: TokenNll,
    dense: TokenNll,
    windows_WS: torch.Tensor,
    *,
    label: str,
    step: int,
    text: str | None = None,
    shards: Shards | None = None,
) -> DenseGap:
    """Read every window twice.

    Args:
        sparse, dense: the model under training attention and under full attention.
        windows_WS: int64 [W, S].
        label, step, text: see `DenseGap`.
        shards: as for `whole_windows`.
    """
    trained, full = (whole_windows(nll, windows_WS, None, shards).window_nll for nll in (sparse, dense))
    return DenseGap(label, step, windows_WS.shape[1], trained, full, text)
