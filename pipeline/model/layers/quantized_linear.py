"""Parallel linears whose matrix is kept in 8 or 4 bits."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from torch.nn import Parameter

from pipeline.model.layers.frozen_weight import KEPT, FrozenWeight
from pipeline.model.layers.quantized_weight import FORMS, empty


def keep(linear: torch.nn.Module, form: str, fused: bool = True) -> torch.nn.Module:
    """Have a parallel linear keep its matrix in `form`, unset: its `weight` becomes the first member, and the others
    stand beside it as `weight_<member>`.

    Args:
        fused: use kernels.

    Raises:
        ConfigError: see `empty`.
    """
    weight, width = linear.weight, linear.input_size
    assert isinstance(weight, Parameter) and isinstance(width, int)
    rows, columns = weight.shape
    first = linear.tp_group.rank() * columns if isinstance(linear, RowParallelLinear) else 0
    part = (first, first + columns)
    members = empty(form, (rows, width), weight.device, part).members()
    names = ["weight" if name == "weight" else f"weight_{name}" for name in members]
    for name, member in zip(names, members.values(), strict=True):
        vars(member).update(vars(weight))  # megatron's marks: how tensor parallelism placed it
        setattr(linear, name, member)

    def kept(owner: torch.nn.Module) -> FrozenWeight:
        # Looked up anew: engine zero3 replaces them.
        return FORMS[form]([owner.get_parameter(name) for name in names], part, width, fused)

    setattr(linear, KEPT, kept)
    return linear
