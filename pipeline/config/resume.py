"""Settings of a resume: which of the run's settings may differ from those its checkpoint was written under."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.errors import ConfigError

MAY_CHANGE = (
    "train.lr",
    "train.lr_embed_norm",
    "train.betas",
    "train.eps",
    "train.weight_decay",
    "train.schedule",
    "train.warmup_steps",
    "train.min_lr_ratio",
    "train.clip",
    "train.steps",
    "train.global_batch",
    "train.seed",
    "lora.dropout",
    "attention.kind",
    "attention.group_size",
    "attention.group_fraction",
    "attention.shifted_heads",
    "attention.dilation",
    "attention.legacy_wrap",
    "data.path",
    "data.sequence",
    "data.text_field",
    "data.mask_documents",
    "model.dtype",
    "model.base",
    "model.fp8_recipe",
)
"""What `resume.allow` may name. The rest decides what the trained tensors are or mean: another value is another run.

Rates, schedule, clipping and AdamW's settings hold from the next step on, moments stay, and the schedule is read at the
step that was reached. Another batch or seed goes on after as many sequences as were read. Other data (`data.path`:
compared by content; `data.sequence` cuts them anew) are read from their beginning."""


@dataclass(frozen=True)
class ResumeConfig:
    """Going on from a checkpoint."""

    allow: tuple[str, ...] = ()
    """Settings, such as train.lr, that may differ from the checkpoint's; every change is recorded."""

    def __post_init__(self) -> None:
        for name in self.allow:
            if name not in MAY_CHANGE:
                raise ConfigError(
                    f"resume.allow: {name} cannot change within a run; remove it (a new run can begin with the trained "
                    f"weights: init_from), or name some of {', '.join(MAY_CHANGE)}."
                )
