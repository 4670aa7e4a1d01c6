"""Folders that whole runs and studies are made in: a tiny model with a tokenizer, text of a few words, a YAML file."""

from __future__ import annotations

import random
from pathlib import Path

from tests.support.tiny_models import make_tiny


def write_words(folder: Path, count: int, first: str = "red") -> None:
    """Text for training and to be held out, `train/` and `val/`, of `count` random words.

    Args:
        first: one of the words; with a full stop there are sentences.
    """
    for part in ("train", "val"):
        (folder / part).mkdir(parents=True)
        words = random.Random(part).choices([first, "blue", "ship", "sea", "and"], k=count)
        (folder / part / "a.txt").write_text(" ".join(words))


def run_place(folder: Path, positions: int, count: int, run: str, first: str = "red") -> Path:
    """A place for one run, whose YAML `run` names the folder as {0}; `base` is made for so many positions."""
    make_tiny(folder / "base", "smollm2", tokenizer=True, max_position_embeddings=positions, num_hidden_layers=1)
    write_words(folder, count, first)
    (folder / "run.yaml").write_text(run.format(folder))
    return folder


def study_place(folder: Path, positions: int, count: int, layers: int = 1, first: str = "red") -> Path:
    """A place for a study, its text below `text/`; see `run_place`."""
    make_tiny(folder / "base", "smollm2", tokenizer=True, max_position_embeddings=positions, num_hidden_layers=layers)
    write_words(folder / "text", count, first)
    (folder / "run.yaml").write_text(
        "model: {path: x, context: 8}\ndata: {path: x}\ntrain: {steps: 1, global_batch: 1}\noutput: x\n"
    )
    return folder
