"""Rows for added tokens: an embedding of more rows than the base stores starts the new ones at the mean of the old.

As LongLoRA's `smart_tokenizer_and_embedding_resize` does for embedding and output matrix (its `[PAD]` makes 32000 rows
32001), but computed over whole stored rows, whichever of them a rank holds.
"""

from __future__ import annotations

import torch

from pipeline.hf.weight_source import WeightSource

VOCABULARY_HF = ("model.embed_tokens.weight", "lm_head.weight")
"""Matrices whose rows are tokens."""


def read_rows(checkpoint: WeightSource, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a vocabulary matrix in its stored dtype, those beyond the stored ones the mean of all.

    Only the rows asked for are read, unless a new one is among them.
    """
    stored, width = checkpoint.facts[name].shape
    if stop <= start:
        return torch.empty((0, width), dtype=checkpoint.facts[name].dtype)
    parts = []
    if start < stored:
        parts.append(checkpoint.slice(name, 0, start, min(stop, stored)))
    if stop > stored:
        new = stop - max(start, stored)
        parts.append(checkpoint.mean_row(name).to(checkpoint.facts[name].dtype).expand(new, width))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def grown_tensor(checkpoint: WeightSource, name: str, rows: int) -> torch.Tensor:
    """A whole tensor; of a vocabulary matrix `rows` rows."""
    if name in VOCABULARY_HF and rows != checkpoint.facts[name].shape[0]:
        return read_rows(checkpoint, name, 0, rows)
    return checkpoint.tensor(name)
