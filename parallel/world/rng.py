"""Seeds and random state: one place that knows every generator."""

from __future__ import annotations

import random

import numpy as np
import torch
from megatron.core import tensor_parallel


def seed_everything(seed: int, stream: int = 0) -> None:
    """Seed Python, NumPy, torch and megatron's tracker (whose dropout stream differs by tensor-parallel rank).

    Args:
        seed: the run's seed.
        stream: ranks with different streams draw different dropout masks.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed + 100 * stream)
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * stream, force_reset_rng=True)


def rng_state() -> dict[str, torch.Tensor]:
    """Torch's generators as uint8 tensors: `cpu`, `cuda` where present, and megatron's named streams.

    Python's and NumPy's generators drive nothing after start-up (data order is a pure function of seed and step).
    """
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    for name, value in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        state[f"tracker.{name}"] = value
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore what `rng_state` returned on a device of the same type (another one's generators have other states)."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    prefix = "tracker."
    tracker = tensor_parallel.get_cuda_rng_tracker()
    known = tracker.get_states()
    saved = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    tracker.set_states({name: saved.get(name, value) for name, value in known.items()})
