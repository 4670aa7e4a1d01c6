"""The model: embedding, megatron-core `TransformerBlock`, final norm, output matrix."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock

from pipeline.model.arch import LlamaArch
from pipeline.model.attention import AttentionContext
from pipeline.model.attention_layout import AttentionSpec, SequenceLayout
from pipeline.model.loss import sum_cross_entropy, token_losses
from pipeline.model.rope import RopePlan, rope_tables
from pipeline.model.spec import block_submodules
from pipeline.schema import LoraConfig


class LlamaStage(MegatronModule):
    """A Llama-class causal language model on megatron-core layers.

    Weights are allocated uninitialized; `weights.load_base` fills them.

    Args:
        arch: sizes, from the checkpoint's config.json.
        rope: how positions are stretched.
        lora: adapters (rank 0: none).
        config: megatron's configuration of the same architecture.
        groups: megatron's process groups.
    """

    def __init__(
        self,
        arch: LlamaArch,
        rope: RopePlan,
        lora: LoraConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.arch, self.rope = arch, rope
        self.embedding = VocabParallelEmbedding(
            arch.vocab, arch.hidden, init_method=config.init_method, config=config, tp_group=groups.tp
        )
        self.decoder = TransformerBlock(
            config=config,
            spec=block_submodules(arch, lora, arch.layers),
            pg_collection=groups,
            pre_process=True,
            post_process=True,
        )
        if not arch.tied:
            self.output_layer = ColumnParallelLinear(
                arch.hidden,
                arch.vocab,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=groups.tp,
            )
        self._tables: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def output_weight(self) -> torch.Tensor:
        """Output matrix [V, H]; the embedding itself when tied."""
        return self.embedding.weight if self.arch.tied else self.output_layer.weight

    def context(self, layout: SequenceLayout, spec: AttentionSpec) -> AttentionContext:
        """What the layers share for micro-batches of this layout; RoPE tables are made once a length, in fp32."""
        device = self.embedding.weight.device
        key = (layout.sequence, device)
        if key not in self._tables:
            positions = torch.arange(layout.sequence, dtype=torch.int64, device=device)
            # Only the last length is kept: evaluation at many lengths must not pile tables up.
            self._tables = {key: rope_tables(self.rope, self.arch.head_dim, positions)}
        return AttentionContext(spec, layout, *self._tables[key])

    def forward(self, tokens_BS: torch.Tensor, layout: SequenceLayout, spec: AttentionSpec) -> torch.Tensor:
        """int64 tokens [B, S] -> final hidden states [S, B, H] in the parameters' dtype."""
        hidden = self.embedding(tokens_BS).transpose(0, 1).contiguous()
        if self.training and not hidden.requires_grad:
            # With a frozen embedding, re-entrant checkpointing would drop every gradient: its input must require one.
            hidden.requires_grad_()
        return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=self.context(layout, spec))

    def loss_sum(
        self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor, layout: SequenceLayout, spec: AttentionSpec
    ) -> torch.Tensor:
        """Sum of cross entropies in nats over labels that are not IGNORE; fp32 scalar, differentiable."""
        hidden = self(tokens_BS, layout, spec)
        return sum_cross_entropy(hidden.flatten(0, 1), self.output_weight, labels_BS.t().reshape(-1))

    @torch.no_grad()
    def token_nll(self, tokens_BS: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        """Negative log-likelihood in nats of tokens 1..S-1 given those before, fp32 [B, S-1]."""
        hidden = self(tokens_BS, SequenceLayout.dense(*tokens_BS.shape), spec)[:-1]
        labels = tokens_BS[:, 1:].t()
        losses = token_losses(hidden.flatten(0, 1), self.output_weight, labels.reshape(-1))
        return losses.view(labels.shape).t()

    @torch.no_grad()
    def logits(self, tokens_BS: torch.Tensor, layout: SequenceLayout, spec: AttentionSpec) -> torch.Tensor:
        """Logits [B, S, V] in the parameters' dtype; for tests and short inputs only."""
        return (self(tokens_BS, layout, spec) @ self.output_weight.t()).transpose(0, 1)
