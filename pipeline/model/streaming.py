"""S² streaming: a sequence of any length through one model in constant memory, with the gradients of one pass.

With a fixed group a chunk needs of the tokens before it only K and V of part of a group, in every layer (the *halo*).
So: forward, chunk after chunk, without gradients, each layer's halo parked in host memory; then backward, from the last
chunk to the first: the chunk runs again on its halo, with gradients, and its backward adds to dK and dV what the chunk
after it sent, and leaves its own halo's for the chunk before. The last chunk runs once. Nothing is approximated. The
first pass computes no more than halos are made of (`planning.first_pass`).

A layer's halo comes from host memory while the layer before it runs (`fetch_halos_early`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from parallel.axes.context import Exchange
from parallel.axes.halo_plan import Region
from parallel.axes.stream import ParkedHalos, Route, StreamExchange, key_of
from parallel.world.context_shard import ContextShard
from parallel.world.rng import rng_state, set_rng_state
from pipeline.data.loader import Batch
from pipeline.data.packing import IGNORE
from pipeline.model.attention.layer import AttentionContext
from pipeline.model.layers.parking import parking_of
from pipeline.model.layers.recomputation import recomputing
from pipeline.planning.attention_layout import AttentionSpec, HeadPlan, SequenceLayout
from pipeline.planning.context_shards import halo_plan
from pipeline.planning.first_pass import cuts_tokens, tokens_entering, whole
from pipeline.planning.recompute import RecomputePolicy
from pipeline.planning.stream import StreamPlan, halo_bytes

if TYPE_CHECKING:
    from pipeline.model.chunk import LlamaChunk
    from pipeline.model.rank_model import RankModel


class ChunkPast:
    """Where a chunk's halos come from, in one pass over it (`attention.layer.Past`).

    Args:
        parks: keys and values that later chunks read go to host memory: this is the first pass.
        entering: of each layer how many of the shard's last tokens enter it, then how many leave the last one; None:
            all.
    """

    def __init__(
        self,
        stream: StreamPlan,
        chunk: int,
        shard: ContextShard,
        layout: SequenceLayout,
        spec: AttentionSpec,
        parked: ParkedHalos,
        parks: bool,
        entering: tuple[int, ...] | None = None,
    ) -> None:
        self._stream, self._chunk, self._shard = stream, chunk, shard
        self._layout, self._spec, self._parked, self._parks = layout, spec, parked, parks
        self._entering = entering

    def exchange(self, layer: int, heads: HeadPlan, reads: Sequence[Region]) -> Exchange:
        """As `Past.exchange`."""
        shard, tokens = self._shard, self._shard.tokens if self._entering is None else self._entering[layer]
        if tokens < shard.tokens:
            shard = shard.last(tokens)
        return StreamExchange(shard, self._route(layer, heads), reads, layer, self._parked, self._parks)

    def leaving(self, layer: int) -> int | None:
        """As `Past.leaving`."""
        wanted = self._shard.tokens if self._entering is None else self._entering[layer + 1]
        return None if wanted == self._shard.tokens else wanted

    def bring(self, layer: int, heads: HeadPlan) -> None:
        """Start to copy a layer's parked halos of this chunk to the device, unless they are on their way."""
        for message in self._route(layer, heads).parked:
            self._parked.bring(key_of(layer, message))

    def _route(self, layer: int, heads: HeadPlan) -> Route:
        """A layer's messages: where no query sees beyond the chunk, those alone that it parks."""
        route = self._whole_route(heads)
        cut = self._entering is not None and (
            self._entering[layer] < self._shard.tokens or self._entering[layer + 1] == 0
        )
        return replace(route, incoming=(), near=(), lent=()) if cut else route

    def _whole_route(self, heads: HeadPlan) -> Route:
        chunk, rank, size = self._chunk, self._shard.rank, self._shard.size

        def make() -> Route:
            return Route.of(halo_plan(self._layout, self._spec, heads, self._stream.edges), chunk, rank, size)

        return self._layout.remember(("route", self._spec.group, heads.blocks, self._stream, chunk, rank), make)


def fetch_halos_early(stage: LlamaChunk) -> None:
    """Have each layer's halo copied to the device while the layer before it runs, forward and in recomputations.

    Copies to one GPU go one after the other. While layer i runs engine zero3 sends the weights of a later one, 16 ms of
    them for 70B in 8 bits, and a halo asked for in the midst of layer i would come behind these. That of layer i + 1 is
    enqueued before them (its own layer's weights are under way then, and the layer waits for those anyway), so no halo
    is waited for. It takes the memory of one layer's halo more.
    """
    layers = list(stage.decoder.layers)

    def bring(place: int, context: AttentionContext) -> None:
        if isinstance(context.past, ChunkPast) and 0 <= place < len(layers):
            core = layers[place].self_attention.core_attention
            context.past.bring(core.layer, core.heads(context.spec))

    def bring_again(place: int, context: AttentionContext) -> None:
        """In a backward pass only a layer that runs again asks for its halo again."""
        if place >= 0 and layers[place].recompute is RecomputePolicy.FULL:
            bring(place, context)

    def hook(place: int, layer: torch.nn.Module) -> None:
        def before(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            context = kwargs["packed_seq_params"]
            bring(place, context)  # of the first layer of a pass; others are on their way
            if recomputing():
                bring_again(place - 1, context)
            else:
                bring(place + 1, context)

        def after(_: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: tuple[torch.Tensor, Any]) -> None:
            context, hidden = kwargs["packed_seq_params"], output[0]
            if hidden.requires_grad:
                hidden.register_hook(lambda _: bring_again(place - 1, context))

        # First of all hooks: engine zero3 enqueues weights in its own.
        layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        layer.register_forward_hook(after, with_kwargs=True, prepend=True)

    for place, layer in enumerate(layers):
        hook(place, layer)


class SequenceStream:
    """Trains on whole sequences chunk by chunk.

    Args:
        model: of one stage (no pipelining).
        chunk: tokens at work at once, over all ranks of a replica.
        without: optimisations switched off (train.without): early_halos, fetched a layer ahead, in order with engine
            zero3's copies of weights; short_first_pass.
        recipe: model.fp8_recipe.
    """

    def __init__(self, model: RankModel, chunk: int, without: Sequence[str] = (), recipe: str = "none") -> None:
        self._model, self.chunk, self._recipe = model, chunk, recipe
        early, self._short = "early_halos" not in without, "short_first_pass" not in without
        inbound = model.shards.copies if early and model.shards is not None else None
        self.parked = ParkedHalos(model.groups.device, inbound)
        if early:
            (stage,) = model.stages
            fetch_halos_early(stage)
        self._reserved: tuple[int, int, AttentionSpec] | None = None

    def close(self) -> None:
        """Give host memory back."""
        self.parked.close()

    def passes(self, sequence: int) -> int:
        """Passes over chunks that a sequence of so many tokens takes: two over each, one over the last."""
        return 2 * -(-sequence // self.chunk) - 1

    def reserve(self, rows: int, sequence: int, spec: AttentionSpec) -> None:
        """Take the host memory that `rows` sequences' halos need, at once and before they are computed.

        Raises:
            LongspanError: it cannot be page-locked.
        """
        model, key = self._model, (rows, sequence, spec)
        if key == self._reserved:
            return
        self._reserved = key
        cut = StreamPlan.of(sequence, self.chunk, model.groups.plan)
        need = halo_bytes(cut, model.arch, spec, model.groups.plan, rows, model.dtype.itemsize)
        self.parked.reserve(need.parked)
        width = 2 * model.arch.ffn // model.groups.plan.tp * model.dtype.itemsize
        parking_of(model.groups.device).expect(rows * cut.shards[0] * width)

    def train(
        self,
        batch: Batch,
        spec: AttentionSpec,
        scale: float,
        before_last_backward: Callable[[], None] = lambda: None,
        between: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch; gradients of `scale` times its summed loss.

        Args:
            batch: whole sequences.
            spec: kind s2.
            scale: factor of the loss.
            before_last_backward: called when the first chunk's backward comes next, the last of all.
            between: called between two chunks; may raise to abandon the step.

        Returns:
            This rank's sum of losses, fp64 scalar.
        """
        model = self._model
        (stage,) = model.stages
        rows, sequence = batch.tokens.shape
        stream = StreamPlan.of(sequence, self.chunk, model.groups.plan)
        layout = padded_layout(batch, stream.padded)
        last = len(stream.starts) - 1
        total = torch.zeros((), dtype=torch.float64, device=model.groups.device)
        replays = model.lora.dropout > 0.0
        shortens = self._short and not replays  # what is replayed was drawn for all tokens
        states: dict[int, dict[str, torch.Tensor]] = {}
        self.reserve(rows, sequence, spec)
        self.parked.begin()

        def hidden(number: int, parks: bool, entering: tuple[int, ...] | None = None) -> torch.Tensor:
            shard = self._shard(stream, number)
            past = ChunkPast(stream, number, shard, layout, spec, self.parked, parks, entering)
            tokens = own_tokens(batch.tokens, shard, 0, model.groups.device)
            return stage.hidden(tokens, stage.context(layout, spec, shard, past))

        for number in range(last):
            if replays:
                states[number] = rng_state()
            entering = self._entering(stream, number, layout, spec) if shortens else None
            if entering is None or entering[0]:
                with torch.no_grad():
                    hidden(number, True, entering)
            between()
        after: dict[str, torch.Tensor] | None = None
        for number in range(last, -1, -1):
            if replays and number < last:
                set_rng_state(states.pop(number))
            own = own_part(batch.labels, self._shard(stream, number), IGNORE)
            labels, scored = own.to(model.groups.device, non_blocking=True), stage.scored_tokens(own)
            loss = stage.loss_of(hidden(number, False), labels, scored)
            if replays and number == last:
                after = rng_state()
            total.add_(loss.detach().double())
            if number == 0:
                before_last_backward()
            with contextlib.nullcontext() if model.shards is None else model.shards.going_backward():
                (loss * scale).backward()
            if number:
                between()
        if after is not None:
            set_rng_state(after)
        assert not self.parked.waiting, "every gradient of a halo has reached the chunk it belongs to"
        assert not self.parked.coming, "every halo that was brought has been read"
        return total

    def _entering(
        self, stream: StreamPlan, number: int, layout: SequenceLayout, spec: AttentionSpec
    ) -> tuple[int, ...]:
        """As `tokens_entering`, but a chunk that is needed at all enters the first layer whole.

        Layers take fewer tokens where one rank has all of a chunk, and where their products take any number. A chunk
        that nobody reads enters too where other ranks' documents differ and all gather weights together.
        """
        (stage,) = self._model.stages
        grid, cores = self._model.groups.plan, [layer.self_attention.core_attention for layer in stage.decoder.layers]
        gathers = self._model.shards is not None and self._model.shards.world > 1
        if not cuts_tokens(grid.tp, grid.cp, self._recipe):
            return whole(stream.shards[number], len(cores))
        heads = [core.heads(spec) for core in cores]
        key = ("entering", spec.group, tuple(each.blocks for each in heads), stream, number)

        def make() -> tuple[int, ...]:
            first, *others = tokens_entering(layout, spec, heads, stream.edges, number)
            return (stream.shards[number] if first or gathers else 0, *others)

        return layout.remember(key, make)

    def _shard(self, stream: StreamPlan, number: int) -> ContextShard:
        """This rank's part of chunk `number`."""
        groups = self._model.groups
        return ContextShard(
            groups.collection.cp,
            groups.coordinates.cp,
            groups.plan.cp,
            stream.shards[number],
            offset=stream.starts[number],
        )


def own_part(values_BN: torch.Tensor, shard: ContextShard, filler: int) -> torch.Tensor:
    """A shard's tokens [B, L] of whole sequences, padded on the right."""
    values = values_BN[:, shard.start : shard.stop]
    missing = shard.tokens - values.shape[1]
    if missing:
        values = functional.pad(values, (0, missing), value=filler)
    return values.contiguous()


def own_tokens(values_BN: torch.Tensor, shard: ContextShard, filler: int, device: torch.device) -> torch.Tensor:
    """`own_part` of values in host memory, on the device."""
    return own_part(values_BN, shard, filler).to(device, non_blocking=True)


def padded_layout(batch: Batch, tokens: int) -> SequenceLayout:
    """Of the whole sequences, padded on the right to so many tokens."""
    rows, sequence = batch.tokens.shape
    padding = tokens - sequence
    documents = None if batch.document_ids is None else batch.document_ids.numpy()
    mask = None
    if padding:
        mask = np.broadcast_to(np.arange(tokens) < sequence, (rows, tokens))
        if documents is not None:
            documents = np.pad(documents, ((0, 0), (0, padding)), mode="edge")
    return SequenceLayout.build(rows, tokens, mask, documents)
