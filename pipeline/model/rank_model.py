"""The model as one rank holds it: pipeline chunks and tensor-parallel slices, fed with its tokens of each sequence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from torch.nn import functional

from parallel.axes.kv_cache import KeyValueCache
from parallel.axes.pipeline import relay, run_schedule
from parallel.axes.zero3 import FrozenShards
from parallel.world.collectives import sum_over
from parallel.world.context_shard import ContextShard
from parallel.world.grid import plan_stages
from parallel.world.groups import Groups
from pipeline.config.sections import LoraConfig
from pipeline.data.loader import Batch
from pipeline.data.packing import IGNORE
from pipeline.model.attention.layer import AttentionContext
from pipeline.model.chunk import Chunk, LlamaChunk
from pipeline.model.layers.frozen_weight import FrozenWeight
from pipeline.model.megatron_config import transformer_config
from pipeline.model.prefill import CachedPast, prefill
from pipeline.model.streaming import SequenceStream, own_part, own_tokens, padded_layout
from pipeline.model.weights.zero3_units import shard_stage
from pipeline.planning.arch import LlamaArch
from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout
from pipeline.planning.recompute import RecomputePolicy, plan_recompute
from pipeline.planning.rope import RopePlan
from pipeline.planning.stream import StreamPlan

ScoresOf = Callable[[LlamaChunk, torch.Tensor, torch.Tensor], torch.Tensor]
"""(last stage, hidden states, local labels [B, L]) -> fp32 [kinds, B, L]."""


@dataclass(frozen=True)
class LocalBatch:
    """What one rank computes of a micro-batch; L tokens of each of its B sequences."""

    tokens: torch.Tensor
    """int64 [B, L]; 0 on padding."""
    labels: torch.Tensor
    """int64 [B, L]; IGNORE on padding."""
    layout: SequenceLayout
    """Of the whole padded sequences."""
    scored: torch.Tensor | None
    """As `LlamaChunk.scored_tokens` has it of the last stage, on whose ranks it is read."""


class RankModel(torch.nn.Module):
    """One rank's share of a Llama-class model on the grid of `groups`.

    Every rank of a replica is given the same whole micro-batches and cuts out its own tokens; sequences are padded on
    the right to shards of equal length.

    Args:
        arch, rope, lora: see `LlamaChunk`.
        groups: the grid.
        dtype: of the weights.
        recompute: policy of every layer of the whole model (`planning.recompute`), or one word for all.
        chunks: layers of every pipeline chunk (`RunPlan.chunks`); None: one chunk a stage.
        shards: engine zero3: takes the frozen matrices; None: every rank holds its slice of them.
        kinds: train.trainable, which decides what `shards` takes.
        family: whose classes the layers are of (`spec.FAMILIES`).
        without: optimisations switched off (train.without).
        stream: train chunk by chunk of so many tokens (`streaming`); None: whole sequences. Needs one stage.
        prefill: score with full attention chunk by chunk of so many tokens (`prefill`); None: whole sequences.
        base: how frozen matrices are kept (model.base).
        recipe: in what linears multiply (model.fp8_recipe).
    """

    def __init__(
        self,
        arch: LlamaArch,
        rope: RopePlan,
        lora: LoraConfig,
        groups: Groups,
        dtype: torch.dtype,
        recompute: Sequence[RecomputePolicy] | str,
        chunks: Sequence[range] | None = None,
        shards: FrozenShards | None = None,
        kinds: Sequence[str] = (),
        family: str = "local",
        without: Sequence[str] = (),
        stream: int | None = None,
        prefill: int | None = None,
        base: str = "bf16",
        recipe: str = "none",
    ) -> None:
        super().__init__()
        self.shards = shards
        self.arch, self.rope, self.lora, self.groups, self.dtype = arch, rope, lora, groups, dtype
        plan = groups.plan
        self.tp_rank, self.tp_size = groups.collection.tp.rank(), plan.tp
        self.chunk_layers = layers = tuple(chunks or plan_stages(arch.layers, plan.pp))
        # Sharded weights are never allocated whole, so the modules are made without memory first.
        home = contextlib.nullcontext() if shards is None else torch.device("meta")
        config = transformer_config(arch, plan, dtype, groups.device, layers, sharded=shards is not None)
        policies = plan_recompute(recompute, arch.layers) if isinstance(recompute, str) else recompute
        self.chunks = torch.nn.ModuleList()
        for number in range(groups.stage, len(layers), plan.pp):
            chunk = Chunk(
                layers[number],
                first=number == 0,
                last=number == len(layers) - 1,
                virtual=number // plan.pp if len(layers) > plan.pp else None,
            )
            with home:
                self.chunks.append(
                    LlamaChunk(
                        arch, rope, lora, config, groups.collection, chunk, policies, family, without, base, recipe
                    )
                )
        if shards is not None:
            (stage,) = self.stages
            shard_stage(stage, kinds, shards)
        self.prefill, self._cache = prefill, KeyValueCache()
        self.stream = None if stream is None else SequenceStream(self, stream, without, recipe)

    @property
    def stages(self) -> list[LlamaChunk]:
        """The chunks, typed."""
        return [cast(LlamaChunk, chunk) for chunk in self.chunks]

    @contextlib.contextmanager
    def positioned(self, rope: RopePlan) -> Iterator[None]:
        """Within, the same weights with other rotary positions."""
        own = self.rope
        try:
            self._place_positions(rope)
            yield
        finally:
            self._place_positions(own)

    def _place_positions(self, rope: RopePlan) -> None:
        self.rope = rope
        for stage in self.stages:
            stage.place_positions(rope)

    def canonical_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """See `LlamaChunk.canonical_parameters`; in model order."""
        for stage in self.stages:
            yield from stage.canonical_parameters()

    def frozen_matrices(self) -> Iterator[tuple[str, FrozenWeight]]:
        """See `LlamaChunk.frozen_matrices`; in model order."""
        for stage in self.stages:
            yield from stage.frozen_matrices()

    def place(self, batch: Batch) -> LocalBatch:
        """This rank's tokens of whole sequences [B, N], on its device, and the layout all ranks share."""
        groups, share, last = self.groups, self.groups.plan.shard_tokens(batch.tokens.shape[1]), self.stages[-1]
        shard = replace(self._shard(), tokens=share)
        labels = own_part(batch.labels, shard, IGNORE)
        return LocalBatch(
            own_tokens(batch.tokens, shard, 0, groups.device),
            labels.to(groups.device, non_blocking=True),
            padded_layout(batch, groups.plan.cp * share),
            last.scored_tokens(labels) if last.chunk.last else None,
        )

    def _context(self, stage: LlamaChunk, layout: SequenceLayout, spec: AttentionSpec) -> AttentionContext:
        return stage.context(layout, spec, self.groups.context_shard(layout.sequence // self.groups.plan.cp))

    def passes(self, batches: Sequence[Batch]) -> int:
        """Between how many passes `train_step` calls `between`: of whole micro-batches, or over chunks of each."""
        if self.stream is None:
            return len(batches)
        return sum(self.stream.passes(batch.tokens.shape[1]) for batch in batches)

    def train_step(
        self,
        batches: Sequence[Batch],
        spec: AttentionSpec,
        scale: float,
        before_last_backward: Callable[[Iterable[torch.nn.Parameter] | None], None] = lambda parameters: None,
        between: Callable[[], None] = lambda: None,
        each: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Forward and backward of one optimizer step's micro-batches on this rank.

        Gradients of `scale` times the summed loss are left for the optimizer's hooks.

        Args:
            batches: micro-batches of whole sequences, all of one shape.
            spec: attention.
            scale: factor of the loss: one over all scored tokens of the step.
            before_last_backward: called when the last micro-batch's backward comes next; under pipelining once a chunk,
                with the parameters that train there, as each chunk comes to it at another time.
            between: called between two micro-batches, streaming: between two chunks (not under pipelining); may raise
                to abandon the step.
            each: fp64 [micro-batches], zero: gets what is returned of each of them.

        Returns:
            This rank's sum of losses, fp64 scalar: over its tokens, zero but on the last stage.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.groups.device)

        def count(number: int, loss: torch.Tensor) -> None:
            total.add_(loss)
            if each is not None:
                each[number] += loss

        self._cache.close()  # kept from window to window of an evaluation
        if self.stream is not None:
            for number, batch in enumerate(batches):
                if number:
                    between()
                final = number == len(batches) - 1
                arm = (lambda: before_last_backward(None)) if final else (lambda: None)
                count(number, self.stream.train(batch, spec, scale, arm, between))
            return total
        placed = [self.place(batch) for batch in batches]
        contexts = [{id(stage): self._context(stage, batch.layout, spec) for stage in self.stages} for batch in placed]

        def forward(number: int, stage: LlamaChunk) -> torch.Tensor:
            batch = placed[number]
            hidden = stage.hidden(batch.tokens, contexts[number][id(stage)])
            if not stage.chunk.last:
                return hidden
            loss = stage.loss_of(hidden, batch.labels, batch.scored)
            count(number, loss.detach().double())
            return loss * scale

        if self.groups.plan.pp > 1:
            rows = batches[0].tokens.shape[0]
            run_schedule(
                self.groups,
                self.stages,
                forward,
                len(placed),
                placed[0].layout.sequence,
                rows,
                lambda chunk: before_last_backward(p for p in chunk.parameters() if p.requires_grad),
            )
            return total
        for number in range(len(placed)):
            if number:
                between()
            loss = forward(number, self.stages[0])
            if number == len(placed) - 1:
                before_last_backward(None)
            with contextlib.nullcontext() if self.shards is None else self.shards.going_backward():
                loss.backward()
        return total

    def frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of all frozen weights this rank keeps: parameters, and engine zero3's shares of a unit."""
        for name, parameter in self.canonical_parameters():
            if not parameter.requires_grad and not self.is_sharded(parameter):
                yield name, parameter
        if self.shards is not None:
            yield from self.shards.shares()

    def close(self) -> None:
        """Give page-locked host memory back; the model cannot run after it."""
        self._cache.close()
        if self.shards is not None:
            self.shards.close()
        if self.stream is not None:
            self.stream.close()

    def is_sharded(self, parameter: torch.nn.Parameter) -> bool:
        """Whether engine zero3 keeps a share of this parameter instead of all of it."""
        return self.shards is not None and self.shards.holds(parameter)

    def _shard(self) -> ContextShard:
        """This rank's place, of no tokens yet."""
        groups = self.groups
        return ContextShard(groups.collection.cp, groups.coordinates.cp, groups.plan.cp, 0)

    @torch.no_grad()
    def token_nll(self, tokens_BS: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        """Negative log-likelihood in nats of tokens 1..S-1 given those before, fp32 [B, S-1], alike on every rank.

        Collective over the ranks of a replica, which are given the same tokens.
        """
        labels = functional.pad(tokens_BS[:, 1:], (0, 1), value=IGNORE)
        return self._score(tokens_BS, labels, spec, 1, lambda *given: LlamaChunk.losses_of(*given).unsqueeze(0))[0]

    @torch.no_grad()
    def token_scores(
        self,
        tokens_BS: torch.Tensor,
        labels_BS: torch.Tensor,
        spec: AttentionSpec,
        documents_BS: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What greedy decoding would make of given continuations, by one teacher-forced forward; alike on every rank.

        Collective over the ranks of a replica, which are given the same tokens.

        Args:
            tokens_BS: int64 [B, S].
            labels_BS: int64 [B, S], the next token where it is scored, IGNORE elsewhere.
            documents_BS: int32 [B, S], document of every token (see `Batch`), each of which attends to itself only;
                None: all is one.

        Returns:
            fp32 [B, S - 1] negative log-likelihoods in nats, 0 where nothing is scored; bool [B, S - 1] whether the
            label is the arg max over the vocabulary (the smallest id among equals), as greedy `generate` picks.
        """
        nll, hits, _ = self._score(tokens_BS, labels_BS, spec, 3, LlamaChunk.scores_of, documents_BS)
        return nll, hits > 0.5

    def _score(
        self,
        tokens_BS: torch.Tensor,
        labels_BS: torch.Tensor,
        spec: AttentionSpec,
        kinds: int,
        of: ScoresOf,
        documents_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """fp32 [kinds, B, S - 1], from the [kinds, B, L] that `of` makes of last stage, hidden states and labels."""
        batch = Batch(tokens_BS.cpu(), labels_BS.cpu(), None if documents_BS is None else documents_BS.cpu())
        plan = self.groups.plan
        rows, tokens = tokens_BS.shape
        at_once = self.prefill if self.prefill is not None and spec.kind == "full" else tokens
        cut = StreamPlan.of(tokens, at_once if at_once < tokens else plan.cp * plan.shard_tokens(tokens), plan)
        layout = padded_layout(batch, cut.padded)
        everything = torch.zeros(kinds, rows, cut.padded, device=self.groups.device)
        for past in self.chunks_of(cut):
            self.score_chunk(batch, past, layout, spec, of, everything)
        return self.gathered(everything)[..., : tokens_BS.shape[1] - 1]

    def score_chunk(
        self,
        batch: Batch,
        past: CachedPast,
        layout: SequenceLayout,
        spec: AttentionSpec,
        of: ScoresOf,
        everything: torch.Tensor,
    ) -> None:
        """Run one chunk of whole sequences, and write what `of` makes of this rank's tokens; see `gathered`.

        Args:
            batch: the whole sequences, in host memory.
            past: of the chunk; the chunks before it have been run, but where it is the only one.
            everything: fp32 [kinds, B, padded S], zero where nothing is written.
        """
        plan, shard = self.groups.plan, past.shard
        whole = len(past.cut.starts) == 1

        def forward(stage: LlamaChunk) -> torch.Tensor:
            mine = self.groups.context_shard(shard.tokens) if whole else shard
            context = stage.context(layout, spec, mine, None if whole else past)
            hidden = stage.hidden(own_tokens(batch.tokens, shard, 0, self.groups.device), context)
            if not stage.chunk.last:
                return hidden
            return of(stage, hidden, own_tokens(batch.labels, shard, IGNORE, self.groups.device))

        if plan.pp == 1:
            scores: torch.Tensor | None = forward(self.stages[0])
        else:
            shape = (shard.tokens // plan.tp, len(batch.tokens), self.arch.hidden)
            scores = relay(self.groups, self.stages, forward, shape, self.dtype)
        if scores is not None:
            everything[..., shard.start : shard.stop] = scores

    def gathered(self, everything: torch.Tensor) -> torch.Tensor:
        """What all ranks of a replica wrote, on each of them; in place."""
        # A sum of disjoint parts is a gather, and reaches the stages that have none.
        sum_over(self.groups.collection.cp, everything)
        if self.groups.plan.pp > 1:
            dist.all_reduce(everything, group=self.groups.collection.pp)
        return everything

    def chunks_of(self, cut: StreamPlan) -> list[CachedPast]:
        """The chunks of a sequence in order, each with its past in this model's cache; see `prefill`."""
        return list(prefill(cut, self._shard(), self._cache))
