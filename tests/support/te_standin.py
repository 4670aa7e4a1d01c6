"""A stand-in for Transformer Engine in plain torch: with it family `te` is built and trained without a GPU.

Signatures are the real ones' (tests/unit/model/test_te_standin.py holds them against the sources), and so is what
megatron-core's wrappers and we rely on: which gradients there are, what travels under tensor and sequence parallelism,
what is returned, which parameters carry megatron's marks. FP8 is emulated: operands are rounded, tensor by tensor.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from torch.nn.parameter import Parameter

from tests.support.signatures import golden

WRAPPERS = "megatron.core.extensions.transformer_engine"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
products: list[bool] = []
"""Of every forward product since it was last cleared: whether it was made in FP8."""
_recipes: list[Any] = []


def _rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In FP8 and back, one scale for the tensor."""
    scale = torch.finfo(dtype).max / tensor.abs().max().float().clamp_min(1e-30)
    return ((tensor.float() * scale).to(dtype).float() / scale).to(tensor.dtype)


class _Product(torch.autograd.Function):
    """x W^T; gradients of x, and of W and the bias if they train."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, fp8: bool
    ) -> torch.Tensor:
        products.append(fp8)
        if fp8 and (rows.shape[:-1].numel() % 8 or rows.shape[-1] % 16):
            raise ValueError(f"FP8 execution requires other dims than {list(rows.shape)}")
        used = (_rounded(rows, E4M3), _rounded(weight, E4M3)) if fp8 else (rows, weight)
        ctx.fp8 = fp8
        ctx.save_for_backward(used[0] if weight.requires_grad else None, used[1])
        return functional.linear(*used, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad = _rounded(grads[0], E5M2) if ctx.fp8 else grads[0]
        flat = grad.flatten(0, -2)
        of_weight = None if rows is None else flat.t() @ rows.flatten(0, -2)
        return grad @ weight, of_weight, flat.sum(0) if ctx.needs_input_grad[2] else None, None


class _Parallel(torch.nn.Module):
    """What both linears have in common."""

    weight: Parameter

    def _build(self, arguments: dict[str, Any]) -> None:
        given = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
        for name in ("in_features", "out_features", "parallel_mode", "return_bias", "tp_group"):
            setattr(self, name, given[name])
        self.use_bias, self.fp8 = given["bias"], False
        self.tp_size = given["tp_size"] if self.tp_group is None else self.tp_group.size()
        self.sequence_parallel = self.tp_size > 1 and given["sequence_parallel"]
        assert not any(value for name, value in given.items() if name.startswith("ub_") or name.startswith("delay_"))
        assert not given["fuse_wgrad_accumulation"] and given["parameters_split"] is None
        if self.parallel_mode == "column":
            assert self.out_features % self.tp_size == 0
            self.out_features //= self.tp_size
        elif self.parallel_mode == "row":
            assert self.in_features % self.tp_size == 0
            self.in_features //= self.tp_size
        made = {"device": given["device"], "dtype": given["params_dtype"] or torch.get_default_dtype()}
        self.weight = Parameter(torch.empty(self.out_features, self.in_features, **made))
        (given["init_method"] or torch.nn.init.normal_)(self.weight)
        axis = 1 if self.parallel_mode == "row" else 0
        vars(self.weight).update(tensor_model_parallel=True, partition_dim=axis, partition_stride=1)
        # The real ones have an empty tensor where there is no bias.
        self.bias = Parameter(torch.zeros(self.out_features, **made)) if self.use_bias else torch.empty(0, **made)
        if self.use_bias and self.parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[union-attr]
        elif self.use_bias:
            vars(self.bias).update(tensor_model_parallel=True, partition_dim=0, partition_stride=1)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        from megatron.core.tensor_parallel import (
            gather_from_sequence_parallel_region,
            reduce_scatter_to_sequence_parallel_region,
        )

        assert self.tp_size == 1 or self.sequence_parallel
        at_once = self.parallel_mode != "row" and self.use_bias and not self.return_bias
        if self.sequence_parallel and self.parallel_mode == "column":
            rows = gather_from_sequence_parallel_region(rows, group=self.tp_group)
        out: torch.Tensor = _Product.apply(rows, self.weight, self.bias if at_once else None, bool(_recipes))
        if self.sequence_parallel and self.parallel_mode == "row":
            out = reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        return out + self.bias if self.use_bias and not self.return_bias and not at_once else out


class Linear(_Parallel):
    """As transformer_engine.pytorch.Linear."""

    def __init__(
        self,
        in_features: Any,
        out_features: Any,
        sequence_parallel: Any = False,
        fuse_wgrad_accumulation: Any = False,
        tp_group: Any = None,
        tp_size: Any = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: Any = None,
        init_method: Any = None,
        bias: Any = True,
        return_bias: Any = False,
        params_dtype: Any = None,
        parallel_mode: Any = None,
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: Any = False,
        ub_overlap_rs: Any = False,
        ub_overlap_rs_dgrad: Any = False,
        ub_bulk_dgrad: Any = False,
        ub_bulk_wgrad: Any = False,
        ub_name: Any = None,
        delay_wgrad_compute: Any = False,
        symmetric_ar_type: Any = None,
        save_original_input: Any = False,
        name: Any = None,
    ) -> None:
        super().__init__()
        self._build(locals())

    def forward(self, inp: Any, is_first_microbatch: Any = None, fp8_output: Any = False, fp8_grad: Any = False) -> Any:
        """The output, and the bias if it is returned."""
        out = self._multiply(inp)
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(_Parallel):
    """As transformer_engine.pytorch.LayerNormLinear; RMSNorm alone."""

    def __init__(
        self,
        in_features: Any,
        out_features: Any,
        eps: Any = 1e-5,
        sequence_parallel: Any = False,
        fuse_wgrad_accumulation: Any = False,
        tp_group: Any = None,
        tp_size: Any = 1,
        get_rng_state_tracker: Any = None,
        init_method: Any = None,
        bias: Any = True,
        normalization: Any = "LayerNorm",
        return_bias: Any = False,
        params_dtype: Any = None,
        parallel_mode: Any = None,
        return_layernorm_output: Any = False,
        return_layernorm_output_gathered: Any = False,
        parameters_split: Any = None,
        zero_centered_gamma: Any = False,
        device: Any = "cuda",
        ub_overlap_ag: Any = False,
        ub_overlap_rs: Any = False,
        ub_overlap_rs_dgrad: Any = False,
        ub_bulk_wgrad: Any = False,
        ub_bulk_dgrad: Any = False,
        ub_name: Any = None,
        delay_wgrad_compute: Any = False,
        symmetric_ar_type: Any = None,
        name: Any = None,
    ) -> None:
        super().__init__()
        assert normalization == "RMSNorm" and not zero_centered_gamma and not return_layernorm_output_gathered
        self.eps, self.return_layernorm_output = eps, return_layernorm_output
        made = {"device": device, "dtype": params_dtype or torch.get_default_dtype()}
        self.layer_norm_weight = Parameter(torch.ones(in_features, **made))
        self._build(locals())
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, inp: Any, is_first_microbatch: Any = None, fp8_output: Any = False, fp8_grad: Any = False) -> Any:
        """The output, the bias if it is returned, and the normalized input if that is."""
        normed = functional.rms_norm(inp, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps)
        found = [self._multiply(normed), *([self.bias] if self.return_bias else [])]
        if self.return_layernorm_output:
            found.append(normed)
        return found[0] if len(found) == 1 else tuple(found)


class RMSNorm(torch.nn.Module):
    """As transformer_engine.pytorch.RMSNorm, which hands `device` to what it is made of."""

    def __init__(
        self,
        normalized_shape: Any = None,
        eps: Any = 1e-5,
        sequence_parallel: Any = None,
        params_dtype: Any = None,
        zero_centered_gamma: Any = False,
        hidden_size: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma and hidden_size is None and kwargs.keys() <= {"device", "dtype", "sm_margin"}
        self.eps, self.weight = eps, Parameter(torch.ones(normalized_shape, dtype=params_dtype, **kwargs))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        """Normalized over the last dimension."""
        return functional.rms_norm(inp, self.weight.shape, self.weight, self.eps)


class FP8GlobalStateManager:
    """Whether a product made now is in FP8."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """As the innermost context says."""
        return bool(_recipes)


@contextlib.contextmanager
def fp8_autocast(
    enabled: Any = True, calibrating: Any = False, fp8_recipe: Any = None, fp8_group: Any = None, _graph: Any = False
) -> Iterator[None]:
    """Within, products are made as the recipe says."""
    outer = _recipes[:]
    _recipes[:] = [fp8_recipe] if enabled else []
    try:
        yield
    finally:
        _recipes[:] = outer


@contextlib.contextmanager
def fp8_model_init(
    enabled: Any = True, recipe: Any = None, preserve_high_precision_init_val: Any = False
) -> Iterator[None]:
    """Parameters in FP8, which we never ask for."""
    assert not enabled
    yield


def is_fp8_available(return_reason: Any = False) -> Any:
    """Of the GPU there is."""
    return (True, "") if return_reason else True


class _Other(ModuleType):
    """A module in which whatever else megatron-core names is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


def _recipe(name: str) -> type:
    def keep(self: Any, fp8_format: Any = None, **more: Any) -> None:
        assert fp8_format is not None and not more
        self.fp8_format = fp8_format

    return type(name, (), {"__init__": keep})


def modules() -> dict[str, ModuleType]:
    """The package, by the names it is imported under."""
    inside = {name: _Other(f"transformer_engine.pytorch.{name}") for name in ("ops", "fp8", "distributed", "router")}
    top, pytorch, common, recipe = (
        _Other(f"transformer_engine{name}") for name in ("", ".pytorch", ".common", ".common.recipe")
    )
    top.__version__ = golden("transformer-engine")[0]  # type: ignore[attr-defined]
    top.__spec__ = mock.Mock()  # so that it can be found
    for parent, name, child in ((top, "pytorch", pytorch), (top, "common", common), (common, "recipe", recipe)):
        setattr(parent, name, child)
    for name, child in inside.items():
        setattr(pytorch, name, child)
    for part in (Linear, LayerNormLinear, RMSNorm, fp8_autocast, fp8_model_init, is_fp8_available):
        setattr(pytorch, part.__name__, part)
    for part in (FP8GlobalStateManager, fp8_autocast, fp8_model_init):
        setattr(inside["fp8"], part.__name__, part)
    recipe.Format = mock.Mock(E4M3="e4m3", HYBRID="hybrid")
    for name in ("Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling"):
        setattr(recipe, name, _recipe(name))
    return {module.__name__: module for module in (top, pytorch, common, recipe, *inside.values())}


@contextlib.contextmanager
def standing_in(package: Callable[[], dict[str, ModuleType]] = modules) -> Iterator[None]:
    """Within, megatron-core's wrappers are made of the stand-in, and a CPU will do for it."""
    import megatron.core.utils as utils

    from pipeline import build

    check, cuda = build.check_transformer_engine, torch.device("cuda")
    with (
        mock.patch.dict(sys.modules, package()),
        mock.patch.object(utils, "_te_version", None),
        mock.patch.object(build, "check_transformer_engine", lambda device, recipe: check(cuda, recipe)),
    ):
        before = sys.modules.pop(WRAPPERS, None)
        try:
            importlib.import_module(WRAPPERS)
            yield
        finally:
            sys.modules.pop(WRAPPERS, None)
            if before is not None:
                sys.modules[WRAPPERS] = before
                sys.modules["megatron.core.extensions"].transformer_engine = before  # type: ignore[attr-defined]
