"""Why a job ends: one sentence that all ranks agree on, and how an exception becomes one."""

from __future__ import annotations

import json
import re
import traceback
from dataclasses import asdict, dataclass
from types import TracebackType

import torch

from parallel.errors import LongspanError
from parallel.health.signals import INTERRUPT_CODE


@dataclass(frozen=True)
class Verdict:
    """Why the job ends."""

    rank: int
    """Whose fault, -1: nobody's alone."""
    text: str
    """One sentence."""
    code: int = 1
    """Exit code of every rank."""
    detail: str = ""
    """Traceback of an unexpected error."""

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Verdict:
        """From JSON."""
        return cls(**json.loads(text))


def at_step(step: int, phase: str) -> str:
    """`at step 12`, with the phase where it is not plain training."""
    place = f"at step {step}" if step else "before the first step"
    return place if phase == "training" else f"{place} ({phase})"


def is_communication_error(error: BaseException) -> bool:
    """Whether an error says only that a peer went away: what happened to the peer is the news, not this."""
    if not isinstance(error, (RuntimeError, OSError)):
        return False
    kinds = (torch.distributed.DistError, ConnectionError)
    named = re.search(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket", str(error), re.IGNORECASE)
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and "torch/distributed/" in frames[-1].filename
    return isinstance(error, kinds) or bool(named) or inside


def verdict_of(error: BaseException, trace: TracebackType | None, rank: int, place: str, lost_touch: bool) -> Verdict:
    """One sentence of an exception, and the traceback unless the user can mend it.

    Args:
        rank: whose exception it is.
        place: see `at_step`.
        lost_touch: it says only that a peer went away.
    """
    if isinstance(error, LongspanError):
        return Verdict(rank, f"rank {rank} failed {place}: {error}", 2)
    if isinstance(error, KeyboardInterrupt):
        return Verdict(rank, f"rank {rank} was interrupted {place}", INTERRUPT_CODE)
    last = traceback.extract_tb(trace)[-1:]
    line = "".join(f" ({'/'.join(at.filename.split('/')[-3:])}:{at.lineno} in {at.name})" for at in last)
    sentence = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if lost_touch:
        return Verdict(rank, f"rank {rank} lost touch with the others {place}: {sentence}{line}", 1)
    detail = "".join(traceback.format_exception(type(error), error, trace))
    return Verdict(rank, f"rank {rank} failed {place}: {sentence}{line}", 1, detail)
