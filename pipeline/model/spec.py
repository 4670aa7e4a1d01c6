"""From an architecture to megatron-core's configuration and layer spec: which class sits where.

A `LayerFamily` names the classes: ours, or megatron-core's own, which ours are measured against. Adapters, attention
and layers are the same for all, and so is every tensor a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from parallel.world.grid import GridPlan
from pipeline.config.sections import LoraConfig
from pipeline.model.attention.layer import CoreAttention, LongAttention
from pipeline.model.layers.layer import LlamaLayer
from pipeline.model.layers.linear import LastRowParallelLinear, TiledColumnParallelLinear, TiledRowParallelLinear
from pipeline.model.layers.lora import Linear, adapted_column, adapted_row
from pipeline.model.layers.mlp import TiledMLP
from pipeline.model.layers.norm import RMSNorm
from pipeline.model.layers.residual import Add, last_residual_add, plain_add, residual_add
from pipeline.model.layers.swiglu import EagerSwiGlu, SwiGlu
from pipeline.model.weights.fusing import fuse_gate_up, fuse_qkv
from pipeline.planning.arch import LlamaArch
from pipeline.planning.recompute import RecomputePolicy
from pipeline.planning.run_plan import refuse_biases


@dataclass(frozen=True)
class LayerFamily:
    """Which class each part of a layer is."""

    column: Linear
    """Column-parallel linear: qkv, gate and up."""
    row: Linear
    """Row-parallel linear whose output stays in the layer: o_proj."""
    last_row: Linear
    """Row-parallel linear whose output leaves the layer: down_proj."""
    norm: Callable[..., torch.nn.Module]
    mlp: Callable[..., MLP]
    """As megatron's MLP, and `recompute` of the layer."""
    activation: Callable[..., torch.nn.Module]
    """Of [gate; up] side by side."""
    add: Callable[[bool, bool], Add]
    """Residual sum inside the layer."""
    last_add: Callable[[bool, bool], Add]
    """Residual sum that leaves the layer."""
    fused: bool
    """Whether RoPE and LoRA's update use kernels, and LoRA makes a norm's output again instead of keeping it."""


def _megatrons_mlp(recompute: RecomputePolicy, **kwargs: Any) -> MLP:
    return MLP(**kwargs)


FAMILIES = {
    "local": LayerFamily(
        column=TiledColumnParallelLinear,
        row=TiledRowParallelLinear,
        last_row=LastRowParallelLinear,
        norm=RMSNorm,
        mlp=TiledMLP,
        activation=SwiGlu,
        add=residual_add,
        last_add=last_residual_add,
        fused=True,
    ),
    # Whole sequences are gathered before a product and whole rows summed after it, an MLP holds its wide tensors for
    # all tokens, a recomputed layer repeats all that its forward did, norms' outputs are kept, and pointwise work is
    # torch's own. The norm is our class because megatron's refuses sequence parallelism; function and gradient are
    # torch's.
    "megatron": LayerFamily(
        column=ColumnParallelLinear,
        row=RowParallelLinear,
        last_row=RowParallelLinear,
        norm=partial(RMSNorm, fused=False),
        mlp=_megatrons_mlp,
        activation=EagerSwiGlu,
        add=plain_add,
        last_add=plain_add,
        fused=False,
    ),
}
"""By name."""


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
        # Layers recompute by their own policies (`LlamaLayer`).
        **pipeline,
    )


def _column(
    family: LayerFamily,
    lora: LoraConfig,
    adapted: Sequence[str],
    parts: Sequence[tuple[str, int]],
    fuse: Callable[..., torch.Tensor],
) -> Linear:
    if not lora.rank or not adapted:
        return family.column
    return partial(
        adapted_column,
        linear=family.column,
        lora=lora,
        parts=parts,
        adapted=adapted,
        fuse_rows=lambda rows: fuse(*rows),
        fused=family.fused,
    )


def _row(family: LayerFamily, lora: LoraConfig, part: str, adapted: Sequence[str]) -> Linear:
    linear = family.last_row if part == "down" else family.row
    if not lora.rank or part not in adapted:
        return linear
    return partial(adapted_row, linear=linear, lora=lora, part=part, fused=family.fused)


def _mlp(
    family: LayerFamily, recompute: RecomputePolicy, ffn: int, submodules: MLPSubmodules
) -> Callable[..., torch.nn.Module]:
    def build(config: TransformerConfig, pg_collection: Any, is_mtp_layer: bool, name: str | None = None) -> MLP:
        """As megatron's layer builds its MLP."""
        return family.mlp(
            recompute=recompute,
            config=config,
            submodules=submodules,
            tp_group=pg_collection.tp,
            ffn_hidden_size=ffn,
            name=name,
        )

    return build


def _layer(arch: LlamaArch, lora: LoraConfig, recompute: RecomputePolicy, family: LayerFamily) -> ModuleSpec:
    head_rows, adapted = arch.head_dim, lora.targets
    qkv_parts = [("q", arch.heads * head_rows), ("k", arch.kv_heads * head_rows), ("v", arch.kv_heads * head_rows)]
    mlp_parts = [("gate", arch.ffn), ("up", arch.ffn)]
    return ModuleSpec(
        module=LlamaLayer,
        params={"recompute": recompute},
        submodules=TransformerLayerSubmodules(
            input_layernorm=family.norm,
            self_attention=ModuleSpec(
                module=LongAttention,
                params={"attn_mask_type": AttnMaskType.causal, "fused_rope": family.fused},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=_column(
                        family, lora, [t for t in adapted if t in "qkv"], qkv_parts, partial(fuse_qkv, arch=arch)
                    ),
                    core_attention=CoreAttention,
                    linear_proj=_row(family, lora, "o", adapted),
                ),
            ),
            self_attn_bda=family.add,
            pre_mlp_layernorm=family.norm,
            mlp=_mlp(
                family,
                recompute,
                arch.ffn,
                MLPSubmodules(
                    linear_fc1=_column(
                        family, lora, [t for t in adapted if t in ("gate", "up")], mlp_parts, fuse_gate_up
                    ),
                    activation_func=family.activation,
                    linear_fc2=_row(family, lora, "down", adapted),
                ),
            ),
            mlp_bda=family.last_add,
        ),
    )


def block_submodules(
    arch: LlamaArch, lora: LoraConfig, recompute: Sequence[RecomputePolicy], family: str = "local"
) -> TransformerBlockSubmodules:
    """Specs of Llama layers, one a policy, and the final norm; adapted projections get adapters beside them.

    Args:
        recompute: policy of every layer, of which there are so many.
        family: name of a LayerFamily.
    """
    classes = FAMILIES[family]
    return TransformerBlockSubmodules(
        layer_specs=[_layer(arch, lora, policy, classes) for policy in recompute], layer_norm=classes.norm
    )
