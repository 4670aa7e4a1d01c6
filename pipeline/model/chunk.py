"""The model, or a pipeline chunk of it: embedding, megatron-core `TransformerBlock`, final norm, output matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock

from parallel.axes.zero3 import FrozenShards
from parallel.errors import ConfigError
from parallel.world.context_shard import ContextShard
from pipeline.config.sections import LoraConfig
from pipeline.model.attention.layer import AttentionContext, Past
from pipeline.model.layers.frozen_weight import FrozenWeight, kept_by
from pipeline.model.layers.loss import VocabShard, scored_tokens, sum_cross_entropy, token_losses, token_scores
from pipeline.model.layers.rotary import rope_tables
from pipeline.model.spec import block_submodules
from pipeline.planning.arch import LlamaArch
from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout
from pipeline.planning.recompute import RecomputePolicy, plan_recompute
from pipeline.planning.rope import RopePlan
from pipeline.planning.tensors import padded_vocab, vocab_range

NORMS_INSIDE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Norms that family te has inside a linear, by the names of ours."""


@dataclass(frozen=True)
class Chunk:
    """Which part of the model a `LlamaChunk` is."""

    layers: range
    """Global indices of its layers."""
    first: bool = True
    """Embeds tokens; otherwise it is given hidden states."""
    last: bool = True
    """Has the final norm and the output matrix."""
    virtual: int | None = None
    """Its number among the chunks of its pipeline rank, under interleaving."""


class LlamaChunk(MegatronModule):
    """A Llama-class causal language model on megatron-core layers, or a pipeline chunk and tensor-parallel slice of it.

    Weights are allocated uninitialized; `load.load_base` and `load.init_adapters` fill them.

    Args:
        arch: sizes, from the checkpoint's config.json.
        rope: how positions are stretched.
        lora: adapters (rank 0: none).
        config: megatron's configuration of the same architecture.
        groups: megatron's process groups.
        chunk: the part to build; None: the whole model.
        recompute: policy of every layer of the whole model; None: nothing is recomputed.
        family: whose classes the layers are of (`spec.FAMILIES`).
        without: optimisations switched off (train.without).
        base: how frozen matrices are kept (model.base).
        recipe: model.fp8_recipe.
    """

    def __init__(
        self,
        arch: LlamaArch,
        rope: RopePlan,
        lora: LoraConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        chunk: Chunk | None = None,
        recompute: Sequence[RecomputePolicy] | None = None,
        family: str = "local",
        without: Sequence[str] = (),
        base: str = "bf16",
        recipe: str = "none",
    ) -> None:
        super().__init__(config=config)
        self.arch, self.rope, self.lora, self.groups = arch, rope, lora, groups
        self.chunk = chunk or Chunk(range(arch.layers))
        # megatron's schedules look for these two.
        self.vp_stage, self.model_type = self.chunk.virtual, ModelType.encoder_or_decoder
        self.tp_rank, self.tp_size = groups.tp.rank(), groups.tp.size()
        vocab = padded_vocab(arch, self.tp_size)
        policies = plan_recompute("none", arch.layers) if recompute is None else recompute
        if self.chunk.first:
            self.embedding = VocabParallelEmbedding(
                vocab,
                arch.hidden,
                init_method=config.init_method,
                reduce_scatter_embeddings=config.sequence_parallel,
                config=config,
                tp_group=groups.tp,
            )
        self.decoder = TransformerBlock(
            config=config,
            spec=block_submodules(
                arch, lora, [policies[layer] for layer in self.chunk.layers], family, without, base, recipe
            ),
            pg_collection=groups,
            pre_process=self.chunk.first,
            post_process=self.chunk.last,
            vp_stage=self.chunk.virtual,
        )
        if self.chunk.last and not (arch.tied and self.chunk.first):
            self.output_layer = ColumnParallelLinear(
                arch.hidden,
                vocab,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=groups.tp,
            )
            # A tied output matrix on another stage than the embedding is a copy: its gradient joins the original's, and
            # the gradient norm counts it once.
            self.output_layer.weight.shared_copy = arch.tied
        self.shards: FrozenShards | None = None
        """As in any `load.Part`; a whole `RankModel` may have them."""
        self._picks = "scored_tokens" not in without
        self._before_output: Callable[[], None] = lambda: None
        self._tables: dict[tuple[int, int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def place_positions(self, rope: RopePlan) -> None:
        """Compute with other rotary positions from now on."""
        self.rope, self._tables = rope, {}

    def canonical_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name, parameter) with global layer indices; a tied copy of the embedding goes by the embedding's name."""
        for name, parameter in self.named_parameters():
            yield "embedding.weight" if getattr(parameter, "shared_copy", False) else self._canonical(name), parameter

    def _canonical(self, name: str) -> str:
        """With the layer's global index; a linear goes by the same name with adapters beside it and without, a norm
        by the same one inside a linear and before it."""
        if not name.startswith("decoder.layers."):
            return name
        _, _, index, rest = name.split(".", 3)
        rest = rest.replace(".base.", ".")
        return f"decoder.layers.{self.chunk.layers[int(index)]}.{NORMS_INSIDE.get(rest, rest)}"

    def frozen_matrices(self) -> Iterator[tuple[str, FrozenWeight]]:
        """(canonical name, matrix) of the layers' linears, which never train."""
        for name, module in self.named_modules():
            # Of any family; nothing else in a layer has both.
            if name.startswith("decoder.") and hasattr(module, "weight") and hasattr(module, "tp_group"):
                yield self._canonical(f"{name}.weight"), kept_by(module)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def output_weight(self) -> torch.Tensor:
        """This rank's rows of the output matrix, [V, H]; the embedding itself when tied on one stage."""
        return self.output_layer.weight if hasattr(self, "output_layer") else self.embedding.weight

    def call_before_output(self, hook: Callable[[], None]) -> None:
        """Have `hook` called whenever the output matrix is about to be read (engine zero3 gathers it)."""
        self._before_output = hook

    @property
    def vocab_shard(self) -> VocabShard | None:
        """Which rows `output_weight` holds; None: all."""
        if self.tp_size == 1:
            return None
        start, stop = vocab_range(self.arch, self.tp_rank, self.tp_size)
        return VocabShard(self.groups.tp, start, stop - start)

    def context(
        self, layout: SequenceLayout, spec: AttentionSpec, shard: ContextShard | None = None, past: Past | None = None
    ) -> AttentionContext:
        """What the layers share for micro-batches of this layout; RoPE tables are made once a length, in fp32.

        Raises:
            ConfigError: full attention would see further than the model's sliding window.
        """
        window = self.arch.sliding_window
        if window is not None and spec.kind == "full" and _longest(layout) > window:
            if shard is not None or not self.arch.all_slide:
                # Of a run's settings it was told before (`run_plan.check_window`); a prompt may come from anywhere.
                raise ConfigError(
                    f"Full attention over {layout.sequence} tokens sees further than the model's sliding_window of "
                    f"{window}; give shorter texts, or run the export in transformers."
                )
            spec = replace(spec, window=window)
        start, tokens = (0, layout.sequence) if shard is None else (shard.start, shard.tokens)
        key = (start, tokens, self.device)
        if key not in self._tables:
            positions = torch.arange(start, start + tokens, dtype=torch.int64, device=self.device)
            # Only the last length is kept: evaluation at many lengths must not pile tables up.
            self._tables = {key: rope_tables(self.rope, self.arch.head_dim, positions)}
        return AttentionContext(spec, layout, *self._tables[key], shard, past)

    def set_input_tensor(self, input_tensor: list[torch.Tensor] | torch.Tensor | None) -> None:
        """Where megatron's schedules put the previous stage's hidden states [S, B, H]."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def hidden(self, tokens_BS: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """int64 local tokens [B, S] (read by the first chunk) -> hidden states [S, B, H] in the parameters' dtype.

        Under sequence parallelism the result holds this rank's S / tp tokens.
        """
        hidden = None
        if self.chunk.first:
            hidden = self.embedding(tokens_BS)
            if not self.config.sequence_parallel:
                hidden = hidden.transpose(0, 1).contiguous()
            if self.training and not hidden.requires_grad:
                # With a frozen embedding, re-entrant checkpointing would drop every gradient: its input must require
                # one.
                hidden.requires_grad_()
        return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=context)

    def forward(self, tokens_BS: torch.Tensor, layout: SequenceLayout, spec: AttentionSpec) -> torch.Tensor:
        """int64 tokens [B, S] of whole sequences -> final hidden states [S, B, H]; see `hidden`."""
        return self.hidden(tokens_BS, self.context(layout, spec))

    def _scored(self, hidden: torch.Tensor, labels_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [L, H] and the labels [T] of the context-parallel shard, of which L tokens are this rank's."""
        self._before_output()
        return hidden.flatten(0, 1), labels_BS.t().reshape(-1)

    def scored_tokens(self, labels_BS: torch.Tensor) -> torch.Tensor | None:
        """For `loss_of`, on the device: which tokens are scored, if it may leave out the others.

        Args:
            labels_BS: the same in host memory.
        """
        scored = scored_tokens(labels_BS.t().reshape(-1)) if self._picks and self.tp_size == 1 else None
        if scored is None or self.device.type == "cpu":
            return scored
        return scored.pin_memory().to(self.device, non_blocking=True)

    def loss_of(
        self, hidden: torch.Tensor, labels_BS: torch.Tensor, scored: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sum of cross entropies in nats over local labels that are not IGNORE; fp32 scalar, differentiable.

        Args:
            scored: from `scored_tokens`; None: products are made of all.
        """
        hidden_LH, labels_T = self._scored(hidden, labels_BS)
        return sum_cross_entropy(hidden_LH, self.output_weight, labels_T, self.vocab_shard, scored)

    @torch.no_grad()
    def losses_of(self, hidden: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        """Cross entropy of each local label in nats, 0 where it is IGNORE; fp32 [B, S]."""
        hidden_LH, labels_T = self._scored(hidden, labels_BS)
        losses = token_losses(hidden_LH, self.output_weight, labels_T, self.vocab_shard)
        return losses.view(labels_BS.shape[1], labels_BS.shape[0]).t()

    @torch.no_grad()
    def scores_of(self, hidden: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        """Cross entropy of each local label in nats, 1 if it is the arg max, and the arg max; 0 at IGNORE; fp32
        [3, B, S]."""
        hidden_LH, labels_T = self._scored(hidden, labels_BS)
        scores = token_scores(hidden_LH, self.output_weight, labels_T, self.vocab_shard)
        return scores.view(3, labels_BS.shape[1], labels_BS.shape[0]).transpose(1, 2)

    @torch.no_grad()
    def logits(self, tokens_BS: torch.Tensor, layout: SequenceLayout, spec: AttentionSpec) -> torch.Tensor:
        """Logits [B, S, V] of a whole model in the parameters' dtype; for tests and short inputs only."""
        hidden = self(tokens_BS, layout, spec)
        self._before_output()
        return (hidden @ self.output_weight.t()).transpose(0, 1)


def _longest(layout: SequenceLayout) -> int:
    """Tokens of the longest document: the padding that shards bring is none."""
    return max((stop - start for _, start, stop in layout.segments(None)), default=0)
