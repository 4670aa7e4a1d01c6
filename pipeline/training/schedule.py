"""The learning rate of a step, as one pure function: a resumed run needs no schedule state."""

from __future__ import annotations

import math


def learning_rate(
    step: int, peak: float, warmup_steps: int, total_steps: int, schedule: str, min_lr_ratio: float
) -> float:
    """Learning rate of optimizer step `step`.

    Linear warm-up uses (step + 1) / warmup_steps of the peak, so the first step already learns (DeepSpeed's WarmupLR
    starts with two steps at 0) and the last warm-up step runs at the peak. `constant` stays there; `cosine` falls along
    half a cosine and reaches `min_lr_ratio * peak` at the last step exactly. A run no longer than its warm-up never
    decays, and a step past the end keeps the final rate.

    Args:
        step: 0-based optimizer step.
        peak: highest learning rate.
        warmup_steps: steps of warm-up; 0 starts at the peak.
        total_steps: optimizer steps of the whole run.
        schedule: constant | cosine.
        min_lr_ratio: the cosine's final rate over its peak, in [0, 1].

    Raises:
        ValueError: a negative step, or an unknown schedule.
    """
    if step < 0:
        raise ValueError(f"step {step} is negative")
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"schedule {schedule!r} is neither constant nor cosine")
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    if schedule == "constant":
        return peak
    top, last = max(warmup_steps - 1, 0), total_steps - 1
    if last <= top:
        return peak
    progress = min((step - top) / (last - top), 1.0)
    weight = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (min_lr_ratio + (1.0 - min_lr_ratio) * weight)
