"""From an architecture to megatron-core's layer spec: which class sits where.

A `LayerFamily` names the classes: ours, megatron-core's own, which ours are measured against, or Transformer Engine's.
Adapters, attention and layers are the same for all, and so is every tensor a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from parallel.errors import ConfigError
from pipeline.config.sections import LoraConfig
from pipeline.model.attention.layer import CoreAttention, LongAttention
from pipeline.model.layers import transformer_engine as te
from pipeline.model.layers.activation import EagerSwiGlu, SwiGlu
from pipeline.model.layers.layer import LlamaLayer
from pipeline.model.layers.linear import LastRowParallelLinear, TiledColumnParallelLinear, TiledRowParallelLinear
from pipeline.model.layers.lora import Linear, adapted_column, adapted_row
from pipeline.model.layers.mlp import TiledMLP
from pipeline.model.layers.norm import RMSNorm, StreamNorm
from pipeline.model.layers.quantized_linear import keep
from pipeline.model.layers.quantized_weight import FORMS
from pipeline.model.layers.residual import Add, last_residual_add, plain_add, residual_add
from pipeline.model.weights.fusing import fuse_gate_up, fuse_qkv
from pipeline.planning.arch import LlamaArch
from pipeline.planning.recompute import RecomputePolicy


@dataclass(frozen=True)
class LayerFamily:
    """Which class each part of a layer is."""

    column: Linear
    """Column-parallel linear: qkv, gate and up; without a `layer_norm` before it, it has one inside."""
    row: Linear
    """Row-parallel linear whose output stays in the layer: o_proj."""
    last_row: Linear
    """Row-parallel linear whose output leaves the layer: down_proj."""
    norm: Callable[..., torch.nn.Module]
    mlp: Callable[..., MLP]
    """As megatron's MLP, and `recompute` of the layer."""
    activation: Callable[..., torch.nn.Module]
    """Of [gate; up] side by side, by megatron's configuration and `recompute` of the layer."""
    add: Callable[[bool, bool], Add]
    """Residual sum inside the layer."""
    last_add: Callable[[bool, bool], Add]
    """Residual sum that leaves the layer."""
    fused: bool
    """Whether RoPE and LoRA's update use kernels, and LoRA may make its input again instead of keeping it."""
    layer_norm: Callable[..., torch.nn.Module]
    """Norms inside a layer; may also return the stream they normalize, as megatron's layer then expects."""
    joint: bool
    """Whether a frozen product and its adapters are one autograd function."""
    fused_qkv: bool
    """Whether one kernel cuts q, k and v and applies RoPE."""
    keeps: bool
    """Whether the linears speak to a `FrozenWeight`, in whatever form."""


HEAD_NORM = partial(RMSNorm, fused=False)
"""Of queries and keys, in every family: the kernel of the gradient goes through rows as wide as the hidden state one by
one, and those of heads are short and many."""


def _megatrons_mlp(recompute: RecomputePolicy, fused: bool, **kwargs: Any) -> MLP:
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
        layer_norm=StreamNorm,
        joint=True,
        fused_qkv=True,
        keeps=True,
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
        layer_norm=partial(RMSNorm, fused=False),
        joint=False,
        fused_qkv=False,
        keeps=False,
    ),
    # Norms lie inside the column-parallel linears. Attention, RoPE, SwiGLU, residual sums and adapters are ours.
    "te": LayerFamily(
        column=te.norm_column,
        row=te.row,
        last_row=te.row,
        norm=te.norm,
        mlp=partial(TiledMLP, tiled=False),
        activation=SwiGlu,
        add=residual_add,
        last_add=last_residual_add,
        fused=True,
        layer_norm=IdentityOp,
        joint=False,
        fused_qkv=True,
        keeps=False,
    ),
}
"""By name, as in model.family."""
WITHOUT: dict[str, dict[str, Any]] = {
    "joint_adapters": {"joint": False},
    "stream_norm": {"layer_norm": RMSNorm},
    "fused_qkv": {"fused_qkv": False},
    "balanced_attention": {},  # no class: attention's spec says it (`RunPlan.of`)
    "early_halos": {},  # nor here: copies are in another order (`streaming.fetch_halos_early`)
    "scored_tokens": {},  # the loss's (`LlamaChunk.scored_tokens`)
    "short_first_pass": {},  # nor here: `streaming.SequenceStream`
    "kernels": {
        "fused": False,
        "fused_qkv": False,
        "norm": partial(RMSNorm, fused=False),
        "layer_norm": partial(RMSNorm, fused=False),
        "activation": EagerSwiGlu,
    },
}
"""What a family is without an optimisation, by its word in train.without."""


def _keeping(linear: Linear, form: str, fused: bool) -> Linear:
    """The same linear, its matrix kept in `form`."""

    def build(*args: Any, **kwargs: Any) -> torch.nn.Module:
        return keep(linear(*args, **kwargs), form, fused)

    return build


def _with_bias(wanted: bool, linear: Linear) -> Linear:
    """The linear, with a bias that it adds itself: megatron has one switch for all projections but q, k and v."""
    if not wanted:
        return linear

    def build(*args: Any, **kwargs: Any) -> torch.nn.Module:
        return linear(*args, **{**kwargs, "bias": True, "skip_bias_add": False})

    return build


def in_form(family: LayerFamily, form: str) -> LayerFamily:
    """A family whose linears keep their matrices as model.base says.

    Raises:
        ConfigError: its linears read their weight as it is.
    """
    if form not in FORMS:
        return family
    if not family.keeps:
        raise ConfigError(f"model.base: {form} needs our own linears; set model.family: local, or model.base: bf16.")
    linears = family.column, family.row, family.last_row
    column, row, last_row = (_keeping(linear, form, family.fused) for linear in linears)
    return replace(family, column=column, row=row, last_row=last_row)


def in_recipe(family: LayerFamily, recipe: str) -> LayerFamily:
    """A family whose linears multiply as model.fp8_recipe says, one of `transformer_engine`'s or none.

    Raises:
        ConfigError: its linears know no recipes.
    """
    if recipe == "none":
        return family
    if family.column is not te.norm_column:
        raise ConfigError(f"model.fp8_recipe: {recipe} is Transformer Engine's; set model.family: te, or remove it.")
    column, row = partial(te.norm_column, recipe=recipe), partial(te.row, recipe=recipe)
    return replace(family, column=column, row=row, last_row=row)


def _again(family: LayerFamily, recompute: RecomputePolicy) -> bool:
    return family.fused and recompute is not RecomputePolicy.NONE


def _column(
    family: LayerFamily,
    recompute: RecomputePolicy,
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
        again=_again(family, recompute),
        joint=family.joint,
    )


def _row(
    family: LayerFamily, recompute: RecomputePolicy, lora: LoraConfig, part: str, adapted: Sequence[str]
) -> Linear:
    linear = family.last_row if part == "down" else family.row
    if not lora.rank or part not in adapted:
        return linear
    again = _again(family, recompute)
    return partial(
        adapted_row, linear=linear, lora=lora, part=part, fused=family.fused, again=again, joint=family.joint
    )


def _mlp(
    family: LayerFamily, recompute: RecomputePolicy, ffn: int, submodules: MLPSubmodules
) -> Callable[..., torch.nn.Module]:
    def build(config: TransformerConfig, pg_collection: Any, is_mtp_layer: bool, name: str | None = None) -> MLP:
        """As megatron's layer builds its MLP."""
        return family.mlp(
            recompute=recompute,
            fused=family.fused,
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
            input_layernorm=family.layer_norm,
            self_attention=ModuleSpec(
                module=LongAttention,
                params={
                    "attn_mask_type": AttnMaskType.causal,
                    "fused_rope": family.fused,
                    "fused_qkv": family.fused_qkv,
                },
                submodules=SelfAttentionSubmodules(
                    linear_qkv=_column(
                        family,
                        recompute,
                        lora,
                        [t for t in adapted if t in "qkv"],
                        qkv_parts,
                        partial(fuse_qkv, arch=arch),
                    ),
                    core_attention=CoreAttention,
                    q_layernorm=HEAD_NORM if arch.qk_norm else None,
                    k_layernorm=HEAD_NORM if arch.qk_norm else None,
                    linear_proj=_with_bias(arch.o_bias, _row(family, recompute, lora, "o", adapted)),
                ),
            ),
            self_attn_bda=family.add,
            pre_mlp_layernorm=family.layer_norm,
            mlp=_mlp(
                family,
                recompute,
                arch.ffn,
                MLPSubmodules(
                    linear_fc1=_with_bias(
                        arch.mlp_bias,
                        _column(
                            family,
                            recompute,
                            lora,
                            [t for t in adapted if t in ("gate", "up")],
                            mlp_parts,
                            fuse_gate_up,
                        ),
                    ),
                    activation_func=partial(family.activation, recompute=recompute),
                    linear_fc2=_with_bias(arch.mlp_bias, _row(family, recompute, lora, "down", adapted)),
                ),
            ),
            mlp_bda=family.last_add,
        ),
    )


def block_submodules(
    arch: LlamaArch,
    lora: LoraConfig,
    recompute: Sequence[RecomputePolicy],
    family: str = "local",
    without: Sequence[str] = (),
    base: str = "bf16",
    recipe: str = "none",
) -> TransformerBlockSubmodules:
    """Specs of Llama layers, one a policy, and the final norm; adapted projections get adapters beside them.

    Args:
        recompute: policy of every layer, of which there are so many.
        family: name of a LayerFamily.
        without: optimisations switched off, keys of WITHOUT.
        base: model.base.
        recipe: model.fp8_recipe.

    Raises:
        ConfigError: the family cannot keep matrices so, or multiply so.
    """
    classes = FAMILIES[family]
    for word in without:
        classes = replace(classes, **WITHOUT.get(word, {}))
    classes = in_recipe(in_form(classes, base), recipe)
    return TransformerBlockSubmodules(
        layer_specs=[_layer(arch, lora, policy, classes) for policy in recompute], layer_norm=classes.norm
    )
