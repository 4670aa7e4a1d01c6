"""From an architecture and a grid to megatron-core's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from parallel.world.grid import GridPlan
from pipeline.planning.arch import LlamaArch


def _pipeline_layout(stages: Sequence[range]) -> list[list[str]]:
    """megatron's spelling of which chunk holds what."""
    rows = [["decoder"] * len(layers) for layers in stages]
    rows[0].insert(0, "embedding")
    rows[-1].append("loss")
    return rows


def transformer_config(
    arch: LlamaArch,
    plan: GridPlan,
    dtype: torch.dtype,
    device: torch.device,
    stages: Sequence[range] = (),
    sharded: bool = False,
) -> TransformerConfig:
    """megatron-core's configuration of this architecture.

    Args:
        stages: layers of every pipeline chunk (`grid.plan_stages`), used where the plan has several stages.
        sharded: modules are made on torch's default device, for engine zero3 to give them memory.
    """
    pipeline: dict[str, Any] = {}
    if plan.pp > 1:
        interleaved = len(stages) > plan.pp
        pipeline = {
            "pipeline_model_parallel_layout": _pipeline_layout(stages),
            # The interleaved schedule exchanges with both neighbours at once. At pp 2 both are the same rank, and a
            # batch of sends and receives pairs them in order: activations and gradients would be swapped. One by one
            # they overlap with the computation, too, but every pair of ranks then needs a communicator of its own
            # (NVIDIA/Megatron-LM#5240 reports hangs at pp 4).
            "batch_p2p_comm": not interleaved or plan.pp > 2,
            "overlap_p2p_comm": interleaved and plan.pp == 2,
            "batch_p2p_sync": device.type == "cuda",
            # One round of every chunk feeds each stage once (megatron's default, which its own arguments set).
            "microbatch_group_size_per_vp_stage": plan.pp,
        }
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.ffn,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        layernorm_epsilon=arch.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        # Despite its name: build the activation from the spec (SwiGlu), and give it the whole fused projection.
        use_te_activation_func=True,
        # Of o_proj and the MLP each says for itself (`spec`).
        add_bias_linear=False,
        add_qkv_bias=arch.attention_bias,
        qk_layernorm=arch.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=plan.tp,
        context_parallel_size=plan.cp,
        pipeline_model_parallel_size=plan.pp,
        sequence_parallel=plan.tp > 1,
        use_cpu_initialization=sharded or device.type == "cpu",
        perform_initialization=False,
        # Fusions below need CUDA extensions or a second code path; RoPE and attention are ours anyway.
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        # The loss comes as the sum it is meant to be: megatron must not divide it by anything.
        calculate_per_token_loss=True,
        # Layers recompute by their own policies (`LlamaLayer`).
        **pipeline,
    )
