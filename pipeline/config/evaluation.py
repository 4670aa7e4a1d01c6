"""What a run measures before, during and after training. See `sections` for how settings are declared."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.errors import ConfigError
from pipeline.config.checks import at_least, not_empty, one_of
from pipeline.config.paths import DatasetText

RULER_TASKS = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "ruler_vt", "ruler_cwe", "ruler_fwe"),
)
"""RULER's that need no download, as lm-evaluation-harness names them."""
RETRIEVAL_TASKS = ("passkey", "needle")
EVAL_TASKS = (*RETRIEVAL_TASKS, "ruler", "dense_gap", *RULER_TASKS)
"""What an evaluation during training may measure besides perplexity; `ruler`: all of RULER's."""


@dataclass(frozen=True)
class EvalConfig:
    """Perplexity and retrieval with full attention, before, during and after training."""

    path: DatasetText | None = None
    """Held-out text (same forms as data.path), or prepared conversations, of which the loss of their answers is
    measured in place of perplexity; None switches evaluation off."""
    every: int = 0
    """Optimizer steps between evaluations; 0: only before and after training."""
    lengths: tuple[int, ...] = ()
    """Context lengths, tokens; empty uses model.context."""
    windows: int = 4
    """Windows a length."""
    conversations: int | None = None
    """Of held-out conversations only so many are read, the first ones; None: all."""
    stride: int | None = None
    """Sliding window: only the last `stride` tokens of each window are scored; None scores whole windows."""
    tasks: tuple[str, ...] = ()
    """Measured besides perplexity: passkey | needle (retrieval) | ruler, or some of RULER's tasks by name | dense_gap
    (S² against full attention; nothing with attention.kind: full). With any, the base is measured too, at the lengths
    it was made for, and the run's last lines say what was lost."""
    retrieval_lengths: tuple[int, ...] = ()
    """Windows of passkey and needle, tokens; empty uses lengths."""
    depths: int = 5
    """Depths of passkey and needle, from 0 to 100%."""
    trials: int = 4
    """Prompts a length and depth."""
    ruler_lengths: tuple[int, ...] = ()
    """Windows of RULER, tokens; empty uses retrieval_lengths."""
    ruler_trials: int | None = None
    """Prompts of RULER a task and length; None uses depths x trials."""
    prefill: int | None = None
    """Tokens at work at once, over all ranks of a replica: longer windows go through in chunks, and keys and values of
    the earlier ones wait in host memory; None uses train.stream, and without it whole windows are at work."""

    def __post_init__(self) -> None:
        not_empty("eval.path", self.path)
        at_least("eval.every", self.every, 0)
        at_least("eval.windows", self.windows, 1)
        for length in self.lengths:
            at_least("eval.lengths", length, 2)
        if self.conversations is not None:
            at_least("eval.conversations", self.conversations, 1)
        if self.stride is not None:
            at_least("eval.stride", self.stride, 1)
        for task in self.tasks:
            one_of("eval.tasks", task, EVAL_TASKS)
        for length in self.retrieval_lengths:
            at_least("eval.retrieval_lengths", length, 2)
        for length in self.ruler_lengths:
            at_least("eval.ruler_lengths", length, 2)
        if self.ruler_trials is not None:
            at_least("eval.ruler_trials", self.ruler_trials, 1)
        at_least("eval.depths", self.depths, 1)
        at_least("eval.trials", self.trials, 1)
        if self.tasks and self.path is None:
            raise ConfigError("eval.tasks: there is no held-out text to evaluate on; set eval.path, or remove it.")
        if self.prefill is not None:
            at_least("eval.prefill", self.prefill, 1)
        if self.every and self.path is None:
            raise ConfigError("eval.every: there is no held-out text to evaluate on; set eval.path, or remove it.")
