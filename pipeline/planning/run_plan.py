"""The plan of a run, made once: what follows from a configuration, a checkpoint and the number of ranks. No torch.

Making it refuses all that can be refused before anything slow is imported. Preflight, build, evaluation, dry run and
doctor are given it; none of them works it out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

from parallel.errors import ConfigError
from parallel.world.gpu_memory import smallest_gpu
from parallel.world.grid import (
    BatchPlan,
    GridPlan,
    check_interleaving,
    check_model_fits,
    plan_batch,
    plan_grid,
    plan_stages,
)
from pipeline.config.evaluation import RETRIEVAL_TASKS
from pipeline.config.hub import DATASET, model_folder, not_there
from pipeline.config.patterns import is_pattern
from pipeline.config.rope import RopeSettings
from pipeline.config.run import RunConfig
from pipeline.config.sections import ModelConfig
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.balance import advise, busiest_rank
from pipeline.planning.base_form import check_base, check_recipe
from pipeline.planning.fill_memory import fill_memory
from pipeline.planning.layer_plan import LayerPlan, attention_specs
from pipeline.planning.memory import MemoryEstimate, ParameterCounts, count_parameters, estimate_memory, plan_stream
from pipeline.planning.recompute import RecomputePolicy, plan_recompute
from pipeline.planning.rope import RopePlan, described, plan_rope, replacement_warning, replaces, served_context
from pipeline.planning.stream import PrefillCost, StreamPlan, cache_bytes, prefill_cost, rows_together


def check_growth(stored: int, wanted: int, where: str) -> None:
    """Refuse to drop rows.

    Raises:
        ConfigError: `wanted` rows are fewer than the `stored` ones.
    """
    if wanted < stored:
        raise ConfigError(
            f"{where}: {wanted} rows are fewer than the checkpoint's {stored}; tokens can be added, not dropped."
        )


def check_window(config: RunConfig, arch: LlamaArch, prefill: int | None) -> None:
    """Refuse attention that sees further than a checkpoint with a sliding window does wherever it is served.

    S² within a window trains it as it is: no query of a group is a window away from a key of it. Full attention keeps
    to the window where all layers have it and whole sequences are at work.

    Args:
        prefill: tokens at work at once in evaluations; None: whole windows.

    Raises:
        ConfigError: training or evaluation would see further.
    """
    window, attention, sequence = arch.sliding_window, config.attention, config.sequence
    if window is None:
        return
    reach = config.group * attention.dilation
    if attention.kind == "s2" and min(sequence, reach) > window:
        raise ConfigError(
            f"attention.group_size: groups of {reach} tokens see further than the checkpoint's sliding_window "
            f"of {window}, in which it is served; set at most {window // 2 * 2}, or use a checkpoint without a window."
        )
    obstacle = ""
    if not arch.all_slide:
        obstacle = "which only some of its layers have"
    elif config.parallel.cp > 1:
        obstacle = "which is not computed with parallel.cp above 1"
    needs = f"tokens needs the checkpoint's sliding_window of {window}"
    if obstacle and sequence > window and attention.kind == "full":
        raise ConfigError(
            f"attention.kind: full attention over {sequence} {needs}, {obstacle}; use kind: s2 with a group_size of at "
            f"most {window // 2 * 2}, or a checkpoint without a window."
        )
    if obstacle and sequence > window and attention.full_last_steps:
        raise ConfigError(
            f"attention.full_last_steps: full attention over {sequence} {needs}, {obstacle}; set it to 0, or use a "
            "checkpoint without a window."
        )
    asked = max(config.eval_lengths + config.retrieval_lengths + config.ruler_lengths)
    if not obstacle and prefill is not None and asked > prefill:
        obstacle = "which is not computed in chunks (eval.prefill, train.stream)"
    if obstacle and config.eval.path is not None and asked > window:
        raise ConfigError(
            f"eval.lengths: evaluation in full attention over {asked} {needs}, {obstacle}; give lengths of at most "
            f"{window}, or set eval.path to null."
        )


@cache
def plan_model(settings: ModelConfig, stored: LlamaArch) -> tuple[LlamaArch, RopePlan]:
    """The model that is trained, with its added rows, and its rotary positions.

    Args:
        stored: sizes the checkpoint at `settings.path` declares.

    Raises:
        ConfigError: the settings do not fit the checkpoint, or it is not supported.
    """
    arch = stored
    if settings.vocab is not None:
        check_growth(stored.vocab, settings.vocab, "model.vocab")
        arch = replace(stored, vocab=settings.vocab)
    rope, served = settings.rope, served_context(arch, settings.rope.original_context)
    own_linear = arch.rope_scaling is not None and arch.rope_scaling["rope_type"] == "linear"
    # Not in plan_rope: checkpoints of earlier releases, which took it, must still export.
    if rope.type == "auto" and rope.original_context is not None and settings.context <= served and not own_linear:
        raise ConfigError(
            f"model.rope.original_context: context {settings.context} fits the checkpoint's own {served}, so type auto "
            "does not stretch; remove original_context, or set type: linear."
        )
    plan = plan_rope(arch, rope, settings.context)
    if settings.context <= served and not rope.replace and replaces(arch, plan):
        raise ConfigError(
            f"model.rope.type: the checkpoint's own {described(arch)} reaches {served} tokens, and type {rope.type} "
            f"would replace it though context is {settings.context}; use type: auto, which keeps it, or set "
            "model.rope.replace: true if you mean to."
        )
    return arch, plan


def plan_ranks(config: RunConfig, world: int) -> tuple[GridPlan, BatchPlan]:
    """How `world` ranks share the work, as far as it does not depend on the model.

    Raises:
        ConfigError: axes, batch and ranks do not divide each other.
    """
    parallel, train = config.parallel, config.train
    grid = plan_grid(world, parallel.tp, parallel.cp, parallel.pp)
    batch = plan_batch(train.global_batch, train.micro_batch, grid.dp)
    check_interleaving(parallel.pp, parallel.virtual, batch.accumulation)
    return grid, batch


@cache
def plan_chunks(arch: LlamaArch, grid: GridPlan, virtual: int) -> tuple[range, ...]:
    """The layers of every pipeline chunk of a model that tensor parallelism can cut, too.

    Raises:
        ConfigError: the model has too few heads, MLP channels or layers for the grid, or such as it does not divide.
    """
    check_model_fits(grid, arch.heads, arch.kv_heads, arch.ffn)
    return plan_stages(arch.layers, grid.pp, virtual)


def plan_policies(
    config: RunConfig, arch: LlamaArch, grid: GridPlan, chunks: Sequence[range], gpu: int | None, stream: int | None
) -> tuple[RecomputePolicy, ...]:
    """What every layer keeps; for `auto` by the bytes of a GPU."""
    train = config.train
    if train.recompute == "auto":
        return fill_memory(config, arch, grid, chunks, gpu, stream)
    return plan_recompute(train.recompute, arch.layers, train.gate_up)


@dataclass(frozen=True)
class RunPlan:
    """All that follows from a configuration, the checkpoint it names and the number of ranks."""

    config: RunConfig
    arch: LlamaArch
    """The model that runs, with its added rows."""
    rope: RopePlan
    grid: GridPlan
    batch: BatchPlan
    chunks: tuple[range, ...]
    """Layers of every pipeline chunk, in order (`parallel.world.grid.plan_stages`)."""
    attention: AttentionSpec
    """What training attends with."""
    full_attention: AttentionSpec
    """What evaluation attends with, and training in its last `attention.full_last_steps` steps."""
    recompute: tuple[RecomputePolicy, ...]
    """Of every layer of the whole model."""
    stream: int | None
    """Tokens of a streamed sequence at work at once; None: whole sequences."""

    @classmethod
    def of(cls, config: RunConfig, arch: LlamaArch, rope: RopePlan, world: int, gpu: int | None = None) -> RunPlan:
        """The plan for a model that is known: no file is opened.

        Args:
            arch, rope: from `plan_model`.
            world: ranks.
            gpu: bytes of the smallest GPU, which train.stream and train.recompute look at on auto; None: unknown.

        Raises:
            ConfigError: the ranks do not fit the settings or the model.
        """
        if config.parallel.auto:
            raise ConfigError(
                "parallel.auto: no layout was chosen, which this command does not do; write the one that longspan plan "
                "--config says."
            )
        grid, batch = plan_ranks(config, world)
        chunks = plan_chunks(arch, grid, config.parallel.virtual)
        check_base(config.model.base, arch, grid.tp)
        # Of both on auto the chunk is chosen first: as large as fits if pointwise work is made again, which costs less
        # than chunks half as long do.
        asked = "pointwise" if config.train.recompute == "auto" else config.train.recompute
        stream = plan_stream(config, arch, grid, plan_recompute(asked, arch.layers, config.train.gate_up), gpu)
        check_window(config, arch, config.eval.prefill or stream)
        cuts = StreamPlan.of(config.sequence, stream, grid).shards if stream else [grid.shard_tokens(config.sequence)]
        for tokens in dict.fromkeys(cuts):  # the last chunk of a stream may be short
            check_recipe(config.model.fp8_recipe, arch, grid.tp, config.train.micro_batch * tokens // grid.tp)
        attention, full = attention_specs(config)
        return cls(
            config=config,
            arch=arch,
            rope=rope,
            grid=grid,
            batch=batch,
            chunks=chunks,
            attention=attention,
            full_attention=full,
            recompute=plan_policies(config, arch, grid, chunks, gpu, stream),
            stream=stream,
        )

    @classmethod
    def shaped(cls, config: RunConfig, stored: LlamaArch, world: int, gpu: int | None = None) -> RunPlan:
        """The plan for a checkpoint of this shape, which need not be there; see `of` and `plan_model`."""
        return cls.of(config, *plan_model(config.model, stored), world, gpu)

    @property
    def sequence(self) -> int:
        """Tokens of a training sequence."""
        return self.config.sequence

    @property
    def group(self) -> int:
        """Tokens of an S² group."""
        return self.attention.group

    @cached_property
    def layer(self) -> LayerPlan:
        """A rank's part of a layer."""
        specs = self.attention, self.full_attention
        return LayerPlan.of(self.config, self.arch, self.grid, self.stream, specs)

    @cached_property
    def stage_policies(self) -> tuple[RecomputePolicy, ...]:
        """What the layers of a pipeline stage keep, in order: of one that has most of them."""
        stages = (
            tuple(self.recompute[layer] for chunk in self.chunks[stage :: self.grid.pp] for layer in chunk)
            for stage in range(self.grid.pp)
        )
        return max(stages, key=len)

    @cached_property
    def counts(self) -> ParameterCounts:
        """Elements of the whole model."""
        return count_parameters(self.config, self.arch)

    def memory(self) -> MemoryEstimate:
        """What training takes, by formula."""
        found = estimate_memory(self.config, self.layer, self.grid, self.stage_policies)
        cached = self._parked()
        return replace(found, host={**found.host, "evaluation's keys and values": cached}) if cached else found

    @property
    def prefill(self) -> int | None:
        """Tokens at work at once in full attention's evaluations; None: whole windows."""
        return self.config.eval.prefill or self.stream

    def prefill_costs(self, width: int | None = None) -> tuple[PrefillCost, ...]:
        """Of each evaluation length that goes through in chunks.

        Args:
            width: bytes of an element; None: as on a GPU.
        """
        at_once = self.prefill
        if self.config.eval.path is None or at_once is None:
            return ()
        width = width or self.config.model.element_bytes
        return tuple(
            prefill_cost(self.arch, self.grid, n, at_once, width) for n in self.config.eval_lengths if n > at_once
        )

    def _parked(self) -> int:
        """Bytes of host memory of a rank for keys and values while it evaluates, at most."""
        config, at_once, width = self.config, self.prefill, self.config.model.element_bytes
        found = [cost.host for cost in self.prefill_costs()]
        retrieves = any(task in config.eval.tasks for task in RETRIEVAL_TASKS) and at_once is not None
        chunked = [n for n in config.retrieval_lengths if retrieves and n > (at_once or n)]
        prompts = [(n, config.eval.depths * config.eval.trials) for n in chunked]
        if config.ruler_tasks and self.arch.sliding_window is None:
            prompts += [(n, config.ruler_prompts) for n in config.ruler_lengths]  # greedy decoding always waits
        found += [cache_bytes(self.arch, self.grid, n, rows_together(count, n), width) for n, count in prompts]
        return max(found, default=0)

    def balance(self) -> tuple[str, ...]:
        """A sentence for each thing that makes ranks wait for each other."""
        return advise(self.config, self.arch, self.grid)

    def advice(self) -> tuple[str, ...]:
        """What would run and may not be meant, one sentence each."""
        return (*self.balance(), *replacement_warning(self.arch, self.rope), *self._thrice())

    def _thrice(self) -> tuple[str, ...]:
        if self.stream is None or self.stream >= self.sequence or RecomputePolicy.FULL not in self.recompute:
            return ()
        return (
            "train.recompute: streaming runs every chunk forward twice, and full recomputes it once more; with none "
            "and a smaller train.stream, or auto, a step takes about a quarter less.",
        )

    def busiest_rank(self) -> int:
        """The rank that all others wait for."""
        return busiest_rank(self.arch, self.sequence, self.attention, self.grid)

    def as_shipped(self) -> RunPlan:
        """The same with the checkpoint's own rotary positions: model.rope is not looked at."""
        return replace(self, rope=plan_rope(self.arch, RopeSettings(), self.arch.max_positions))


def plan_run(config: RunConfig, world: int, gpu: int | None = None) -> RunPlan:
    """The plan of a run, and with it everything that can be refused before torch allocates.

    Args:
        world: ranks.
        gpu: bytes of a GPU; None: of the smallest of this machine's.

    Raises:
        ConfigError, CheckpointError, DataError: one sentence each, of grid, batch, files, architecture or RoPE.
    """
    plan_ranks(config, world)  # what needs no file is told first
    folder = model_folder("model.path", Path(config.model.path))
    for setting, source in config.data.named_sources.items():
        if not (Path(source).exists() or is_pattern(source)):
            hub = not_there(source, DATASET)
            raise ConfigError(f"{setting}: {source} does not exist; point it at text or prepared shards{hub}.")
    held_out = config.eval.path
    if held_out is not None and not (Path(held_out).exists() or is_pattern(held_out)):
        raise ConfigError(f"eval.path: {held_out} does not exist; point it at text or prepared shards.")
    if gpu is None and "auto" in (config.train.stream, config.train.recompute):
        gpu = smallest_gpu()
    return RunPlan.of(config, *plan_model(config.model, read_arch(folder)), world, gpu)
