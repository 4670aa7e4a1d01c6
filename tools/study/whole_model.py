"""Full fine-tuning, in transformers' model by torch: what adapters are compared with.

The product does not train whole matrices. The windows, their order, the rates' schedule, clipping and AdamW's settings
are the run's own; weights and moments are fp32, products bf16 (autocast) on a GPU. Full attention is transformers' own;
S² is set into its model, layer by layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AutoConfig, LlamaForCausalLM

from parallel.errors import ConfigError
from pipeline.config.rope import RopeSettings
from pipeline.config.run import RunConfig
from pipeline.data.loader import TrainLoader
from pipeline.data.packing import IGNORE, PackedDataset
from pipeline.data.shards import TokenShards
from pipeline.model.attention.local import attend
from pipeline.planning.attention_layout import SequenceLayout, head_plan, layer_rule
from pipeline.planning.recompute import RecomputePolicy
from pipeline.planning.rope import hf_rope_fields
from pipeline.planning.run_plan import RunPlan
from pipeline.training.schedule import learning_rate

OnStep = Callable[[int, float, float, int], None]
"""(steps done, loss in nats, seconds of the step, its tokens)."""


class TrainingAttention:
    """The run's attention as transformers calls one; `full` switches it to full attention."""

    NAME = "longspan-training"

    def __init__(self, plan: RunPlan) -> None:
        self.full, self._plan = False, plan

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """query [B, Hq, S, D], key and value [B, Hkv, S, D] -> [B, S, Hq, D]."""
        plan = self._plan
        spec = plan.full_attention if self.full else plan.attention
        heads, kv_heads = plan.arch.heads, plan.arch.kv_heads
        rule = layer_rule(spec.shifted_heads, int(cast(Any, module).layer_idx))
        q, k, v = (x.permute(2, 0, 1, 3) for x in (query, key, value))
        layout = SequenceLayout.dense(q.shape[1], q.shape[0])
        out = attend(q, k, v, layout, spec, head_plan(0, heads, heads, kv_heads, rule), scaling)
        return out.transpose(0, 1), None


def load_whole(plan: RunPlan, device: torch.device, attention: TrainingAttention | None) -> LlamaForCausalLM:
    """The base with the run's RoPE, fp32, ready to train.

    Args:
        attention: None: transformers' own, full.
    """
    folder, implementation = plan.config.model.path, None
    if attention is not None:
        implementation = attention.NAME
        AttentionInterface.register(implementation, attention)
    settings = AutoConfig.from_pretrained(folder)
    for name, value in hf_rope_fields(plan.rope, plan.arch, plan.config.model.context).items():
        setattr(settings, name, value)
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        folder, config=settings, dtype=torch.float32, attn_implementation=implementation
    )
    if RecomputePolicy.NONE not in plan.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device).train()


def train_whole(plan: RunPlan, shards: TokenShards, folder: Path, device: torch.device, on_step: OnStep) -> None:
    """Train every weight and save the model as a Hugging Face folder.

    Args:
        plan: of one rank; what concerns adapters and the grid is not looked at.
        shards: the training text.
        folder: where the model goes.
        device: where it trains.
        on_step: told of every step; what it raises ends training.

    Raises:
        ConfigError: the windows would be other than the product's.
    """
    config, train = plan.config, plan.config.train
    if shards.scored is not None or config.data.mask_documents:
        raise ConfigError(
            "whole: true trains on windows of plain text, without masks; give text, and no data.mask_documents."
        )
    torch.manual_seed(train.seed)
    attention = None if config.attention.kind == "full" else TrainingAttention(plan)
    model = load_whole(plan, device, attention)
    # As in the product: decay on matrices only.
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == matrix], "weight_decay": decay}
        for matrix, decay in ((True, train.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=device.type == "cuda")
    dataset = PackedDataset(shards, config.sequence)
    with TrainLoader(dataset, train.seed, train.global_batch, train.micro_batch, 0, 1, False) as loader:
        for step in range(train.steps):
            began = time.perf_counter()
            batches = loader.step(step)
            if attention is not None:
                attention.full = config.in_full(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    step, train.lr, train.warmup_steps, train.steps, train.schedule, train.min_lr_ratio
                )
            scored = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
            total = 0.0
            for batch in batches:
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits = model(input_ids=batch.tokens.to(device), use_cache=False).logits
                loss = F.cross_entropy(
                    logits.flatten(0, 1).float(), batch.labels.to(device).flatten(), ignore_index=IGNORE
                )
                loss = loss * (int((batch.labels != IGNORE).sum()) / scored)
                loss.backward()
                total += float(loss.detach())
                del logits, loss
            if train.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - began
            on_step(step + 1, total, took, sum(batch.tokens.numel() for batch in batches))
    model.save_pretrained(folder)  # its config names no implementation of attention


def as_base(config: RunConfig, folder: Path) -> RunConfig:
    """The run whose base is the model that `train_whole` saved, as it is."""
    return replace(config, model=replace(config.model, path=str(folder), rope=RopeSettings("auto")))
