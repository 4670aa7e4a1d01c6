"""What an optimizer holds, for tests that count its bytes or look at its gradients."""

from __future__ import annotations

import torch

from pipeline.training.optimizer import TrainableAdamW


def state_bytes(optimizer: TrainableAdamW) -> int:
    """Bytes of this rank's moments and master copies (a parameter that is its own master adds none)."""
    tensors = [t for slot in optimizer._slots for t in (slot.exp_avg, slot.exp_avg_sq)]
    tensors += [slot.master for slot in optimizer._slots if slot.has_copy]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def flat_gradient(optimizer: TrainableAdamW) -> torch.Tensor:
    """The flat fp32 gradient buffer itself, [elements]."""
    return optimizer._gradients.flat
