"""Do a run's settings fit the prepared conversations it names? A run asks before it loads anything, preflight too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parallel.errors import ConfigError, DataError
from pipeline.config.run import RunConfig
from pipeline.data.folders import read_array
from pipeline.data.shards import DOCUMENTS, is_prepared, read_manifest


def lengths_of(starts: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """Tokens of every document, given where they start in a stream of so many tokens."""
    return np.diff(np.append(starts, tokens))


def holds_conversations(path: Path) -> bool:
    """Whether a path names prepared conversations.

    Raises:
        DataError: it names a prepared folder whose manifest is damaged.
    """
    return is_prepared(path) and bool(read_manifest(path).chat)


def longest_of(folder: Path, first: int | None = None) -> int:
    """Tokens of the longest conversation of a prepared folder.

    Args:
        first: only of so many, the first ones; None: of all.

    Raises:
        DataError: the folder is damaged.
    """
    lengths = lengths_of(read_array(folder / DOCUMENTS), read_manifest(folder).tokens)[:first]
    return int(lengths.max(initial=0))


def check_trained(folder: Path, longest: int | None, sequence: int, mask_documents: bool) -> None:
    """Return if conversations can be trained on.

    Args:
        longest: tokens of the longest one; None: that is looked at elsewhere.
        sequence: tokens of a training window.
        mask_documents: `data.mask_documents`.

    Raises:
        ConfigError: they would attend to each other.
        DataError: one is longer than a window.
    """
    if not mask_documents:
        raise ConfigError(
            f"data.mask_documents: {folder} holds conversations, which must not attend to each other; set it to true."
        )
    if longest is not None and longest > sequence:
        raise DataError(
            f"{folder}: holds a conversation of {longest} tokens, but a window has {sequence}; prepare it again with "
            f"--max-tokens {sequence}, or raise data.sequence."
        )


def check_held_out(folder: Path, longest: int, context: int, tasks: Sequence[str]) -> None:
    """Return if conversations can be evaluated on.

    Args:
        longest: tokens of the longest one.
        context: tokens the model is made for.
        tasks: what else is to be measured (`eval.tasks`, `--tasks`).

    Raises:
        ConfigError: something is asked that is measured on text.
        DataError: a conversation is longer than the context.
    """
    if tasks:
        raise ConfigError(
            f"eval.path: {folder} holds conversations, on which the loss of their answers is measured and nothing "
            f"else; {', '.join(tasks)} {'is' if len(tasks) == 1 else 'are'} measured on text, so leave "
            f"{'it' if len(tasks) == 1 else 'them'} out, or point eval.path at text."
        )
    if longest > context:
        raise DataError(
            f"{folder}: holds a conversation of {longest} tokens, and model.context is {context}; prepare it again "
            f"with --max-tokens {context}."
        )


def check_prepared(config: RunConfig) -> None:
    """Return if the settings fit the conversations among `data.path` and `eval.path` that are prepared already.

    Raises:
        ConfigError, DataError: see `check_trained` and `check_held_out`.
    """
    for source in config.data.sources:
        if holds_conversations(Path(source.path)):
            check_source(config, Path(source.path))
    if config.eval.path is not None and holds_conversations(Path(config.eval.path)):
        check_evaluated(config, Path(config.eval.path), config.eval.tasks)


def check_source(config: RunConfig, folder: Path) -> None:
    """Return if the prepared conversations of a source can be trained on.

    Raises:
        ConfigError, DataError: see `check_trained`.
    """
    check_trained(folder, longest_of(folder), config.sequence, config.data.mask_documents)


def check_evaluated(config: RunConfig, folder: Path, tasks: Sequence[str]) -> None:
    """Return if the prepared conversations of `eval.path` can be evaluated on.

    Args:
        tasks: see `check_held_out`.

    Raises:
        ConfigError, DataError: see `check_held_out`.
    """
    check_held_out(folder, longest_of(folder, config.eval.conversations), config.model.context, tasks)
