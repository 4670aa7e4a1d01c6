"""Whole trained tensors of a checkpoint of any layout: what exports and evaluations start from."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.checkpoint.reader import CheckpointReader


def whole_trained(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every trained tensor of a checkpoint folder, whole, fp32, proven by its checksums: for export and evaluation.

    Raises:
        CheckpointError: it is damaged or of a format this release does not read.
    """
    with CheckpointReader(checkpoint) as reader:
        reader.verify()
        return {name: torch.from_numpy(reader.whole(name)) for name in reader.manifest.tensors}
