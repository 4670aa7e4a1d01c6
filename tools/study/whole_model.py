"""Full fine-tuning with full attention, by transformers and torch alone: what adapters and S² are compared with.

The product does not train whole matrices. The windows, their order, the rates' schedule, clipping and AdamW's settings
are the run's own; weights and moments are fp32, products bf16 (autocast) on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoConfig, LlamaForCausalLM

from parallel.errors import ConfigError
from pipeline.config.rope import RopeSettings
from pipeline.config.run import RunConfig
from pipeline.data.loader import TrainLoader
from pipeline.data.packing import IGNORE, PackedDataset
from pipeline.data.shards import TokenShards
from pipeline.planning.recompute import RecomputePolicy
from pipeline.planning.rope import hf_rope_fields
from pipeline.planning.run_plan import RunPlan
from pipeline.training.schedule import learning_rate

OnStep = Callable[[int, float, float, int], None]
"""(steps done, loss in nats, seconds of the step, its tokens)."""


def load_whole(plan: RunPlan, device: torch.device) -> LlamaForCausalLM:
    """The base with the run's RoPE, fp32, ready to train."""
    folder = plan.config.model.path
    settings = AutoConfig.from_pretrained(folder)
    for name, value in hf_rope_fields(plan.rope, plan.arch, plan.config.model.context).items():
        setattr(settings, name, value)
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, config=settings, dtype=torch.float32)
    if RecomputePolicy.NONE not in plan.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device).train()


def train_whole(
    plan: RunPlan, shards: TokenShards, folder: Path, seconds: float | None, device: torch.device, on_step: OnStep
) -> None:
    """Train every weight and save the model as a Hugging Face folder.

    Args:
        plan: of one rank; what concerns attention, adapters and the grid is not looked at.
        shards: the training text.
        folder: where the model goes.
        seconds: of optimizer steps, after which no other is begun; None: `train.steps` are taken.
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
    model = load_whole(plan, device)
    # As in the product: decay on matrices only.
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == matrix], "weight_decay": decay}
        for matrix, decay in ((True, train.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=device.type == "cuda")
    dataset = PackedDataset(shards, config.sequence)
    spent = 0.0
    with TrainLoader(dataset, train.seed, train.global_batch, train.micro_batch, 0, 1, False) as loader:
        for step in range(train.steps):
            began = time.perf_counter()
            batches = loader.step(step)
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
            spent += took
            on_step(step + 1, total, took, sum(batch.tokens.numel() for batch in batches))
            if seconds is not None and spent >= seconds:
                break
    model.save_pretrained(folder)


def as_base(config: RunConfig, folder: Path) -> RunConfig:
    """The run whose base is the model that `train_whole` saved, as it is."""
    return replace(config, model=replace(config.model, path=str(folder), rope=RopeSettings("auto")))
