"""What one layer of one rank has to do, as far as its work and its memory follow from it; no torch.

Layouts that cut tensors and sequences alike have the same one, whatever their engine, stages, replicas and recompute
policies are. It is small and hashable, so that what is counted by it is counted once (`activations.layer_memory`,
`planner.work`): the planner looks at thousands of layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from parallel.world.grid import GridPlan
from pipeline.config.run import RunConfig
from pipeline.config.sections import AttentionConfig
from pipeline.planning.arch import LlamaArch
from pipeline.planning.attention_layout import AttentionSpec, attention_spec, full_attention
from pipeline.planning.context_shards import least_saved


@dataclass(frozen=True)
class LayerPlan:
    """One rank's part of a layer, of one micro-batch."""

    arch: LlamaArch
    tp: int
    cp: int
    micro_batch: int
    sequence: int
    """Tokens of a training sequence."""
    stream: int | None
    """Tokens of a streamed sequence at work at once; None: all."""
    short_first_pass: bool
    """A streamed chunk's first pass computes no more than later chunks read (`first_pass`)."""
    attention: AttentionSpec
    """What training attends with."""
    full_attention: AttentionSpec
    """What its last steps attend with, if `ends_in_full`."""
    ends_in_full: bool
    base: str
    """model.base."""
    family: str
    """model.family."""
    fp8_recipe: str
    """model.fp8_recipe."""
    width: int
    """Bytes of an element of activations, and of weights that are not quantized."""
    trainable: tuple[str, ...]
    """train.trainable."""
    rank: int
    """lora.rank."""
    targets: tuple[str, ...]
    """Projections that have adapters, which train."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        arch: LlamaArch,
        grid: GridPlan,
        stream: int | None = None,
        specs: tuple[AttentionSpec, AttentionSpec] | None = None,
    ) -> LayerPlan:
        """The layer of a run.

        Args:
            stream: as the field.
            specs: of training, and of full attention; None: as configured (`attention_specs`).
        """
        model, lora, train = config.model, config.lora, config.train
        attention, full = specs or attention_specs(config)
        return cls(
            arch=arch,
            tp=grid.tp,
            cp=grid.cp,
            micro_batch=train.micro_batch,
            sequence=config.sequence,
            stream=stream,
            short_first_pass="short_first_pass" not in train.without and lora.dropout == 0.0,
            attention=attention,
            full_attention=full,
            ends_in_full=config.attention.full_last_steps > 0,
            base=model.base,
            family=model.family,
            fp8_recipe=model.fp8_recipe,
            width=model.element_bytes,
            trainable=train.trainable,
            rank=lora.rank,
            targets=lora.targets if lora.rank and "lora" in train.trainable else (),
        )

    @property
    def at_once(self) -> int:
        """Tokens of a sequence at work at once, over all ranks."""
        return min(self.stream or self.sequence, self.sequence)

    @property
    def chunks(self) -> int:
        """Pieces that a sequence goes through the layers in: more than one where it is streamed."""
        return 1 if self.stream is None else -(-self.sequence // self.stream)

    @property
    def segment(self) -> int:
        """Tokens that attend among themselves while training."""
        return self.attention.group if self.attention.kind == "s2" else self.sequence

    def tokens(self, at_once: int | None = None) -> int:
        """Tokens T of a micro-batch that a tensor-parallel group works on.

        Args:
            at_once: of a sequence; None: all.
        """
        return self.micro_batch * GridPlan(self.tp, self.cp, 1, 1).shard_tokens(at_once or self.sequence)


def attention_specs(config: RunConfig) -> tuple[AttentionSpec, AttentionSpec]:
    """What training attends with, and full attention as evaluation and the last steps have it."""
    return _specs(config.attention, config.group, config.train.without)


@cache
def _specs(settings: AttentionConfig, group: int, without: tuple[str, ...]) -> tuple[AttentionSpec, AttentionSpec]:
    kernels, lend_from = "kernels" not in without, least_saved(without)
    training, full = attention_spec(settings, group), full_attention(settings)
    return replace(training, kernels=kernels, lend_from=lend_from), replace(full, kernels=kernels, lend_from=lend_from)
