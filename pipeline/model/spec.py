"""From an architecture to megatron-core's configuration and layer spec: which class sits where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from parallel.world.grid import GridPlan
from pipeline.config.sections import LoraConfig
from pipeline.model.attention.layer import CoreAttention, LongAttention
from pipeline.model.layers.linear import LastRowParallelLinear, TiledColumnParallelLinear, TiledRowParallelLinear
from pipeline.model.layers.lora import LoraColumnParallelLinear, LoraLastRowParallelLinear, LoraRowParallelLinear
from pipeline.model.layers.mlp import TiledMLP
from pipeline.model.layers.norm import RMSNorm
from pipeline.model.layers.residual import last_residual_add, residual_add
from pipeline.model.layers.swiglu import SwiGlu
from pipeline.model.weights.fusing import fuse_gate_up, fuse_qkv
from pipeline.planning.arch import LlamaArch
from pipeline.planning.run_plan import refuse_biases


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
    recompute: str,
    stages: Sequence[range] = (),
    sharded: bool = False,
) -> TransformerConfig:
    """megatron-core's configuration of this architecture.

    Args:
        recompute: `full` keeps only each layer's input and recomputes the rest; `none` keeps everything.
        stages: layers of every pipeline chunk (`plan.plan_stages`), used where the plan has several stages.
        sharded: modules are made on torch's default device, for engine zero3 to give them memory.

    Raises:
        ConfigError: the checkpoint has biases megatron's layers cannot place.
    """
    refuse_biases(arch)
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
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
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
        add_bias_linear=False,
        add_qkv_bias=arch.attention_bias,
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
        **pipeline,
        **(full if recompute == "full" else {}),
    )


def _column(
    lora: LoraConfig, adapted: Sequence[str], parts: Sequence[tuple[str, int]], fuse: Callable[..., torch.Tensor]
) -> Callable[..., Any]:
    if not lora.rank or not adapted:
        return TiledColumnParallelLinear
    return partial(
        LoraColumnParallelLinear, lora=lora, parts=parts, adapted=adapted, fuse_rows=lambda rows: fuse(*rows)
    )


def _row(lora: LoraConfig, part: str, adapted: Sequence[str]) -> Callable[..., Any]:
    last = part == "down"
    if not lora.rank or part not in adapted:
        return LastRowParallelLinear if last else TiledRowParallelLinear
    return partial(LoraLastRowParallelLinear if last else LoraRowParallelLinear, lora=lora, part=part)


def block_submodules(arch: LlamaArch, lora: LoraConfig, layers: int) -> TransformerBlockSubmodules:
    """Specs of `layers` Llama layers and the final norm; adapted projections become LoRA linears."""
    head_rows = arch.head_dim
    qkv_parts = [("q", arch.heads * head_rows), ("k", arch.kv_heads * head_rows), ("v", arch.kv_heads * head_rows)]
    mlp_parts = [("gate", arch.ffn), ("up", arch.ffn)]
    adapted = lora.targets
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=LongAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=_column(
                        lora, [t for t in adapted if t in "qkv"], qkv_parts, partial(fuse_qkv, arch=arch)
                    ),
                    core_attention=CoreAttention,
                    linear_proj=_row(lora, "o", adapted),
                ),
            ),
            self_attn_bda=residual_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=partial(
                TiledMLP.as_mlp_submodule,
                ffn_hidden_size=arch.ffn,
                submodules=MLPSubmodules(
                    linear_fc1=_column(lora, [t for t in adapted if t in ("gate", "up")], mlp_parts, fuse_gate_up),
                    activation_func=SwiGlu,
                    linear_fc2=_row(lora, "down", adapted),
                ),
            ),
            mlp_bda=last_residual_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
