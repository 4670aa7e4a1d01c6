"""Transformer Engine's linears and norms, by megatron-core's own wrappers of them; the package is optional.

A norm and the column-parallel linear behind it are one module (`LayerNormLinear`): the norm's weight lies inside it,
and `LlamaChunk.canonical_parameters` gives it the name it has elsewhere. Frozen matrices get no gradient: Transformer
Engine then keeps no input for the backward, and makes the input's gradient alone.

FP8 recipes are those without state of their own, scaled by what a product is given. Delayed scaling is not among them:
its scales come from a history that a checkpoint of ours does not hold, and megatron-core has it for whole models only.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch

from parallel.errors import ConfigError

FORMATS = {"tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
"""Of Transformer Engine's recipes, by their words in model.fp8_recipe, the format each of them has by default."""
SUPPORTED_BY = {
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}
"""What Transformer Engine is asked whether this GPU can."""


def _wrappers() -> ModuleType:
    # Here and not above: where Transformer Engine is missing megatron-core makes classes of nothing.
    from megatron.core.extensions import transformer_engine

    return transformer_engine


def check_transformer_engine(device: torch.device, recipe: str) -> None:
    """Refuse a machine that cannot run model.family: te.

    Args:
        recipe: model.fp8_recipe.

    Raises:
        ConfigError: Transformer Engine is missing or broken, there is no GPU, or not one for the recipe.
    """
    ours = "set model.family: local" + (" and model.fp8_recipe: none" if recipe != "none" else "")
    install = f"install it beside a GPU (docs/LAUNCH.md), or {ours}"
    if importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(f"model.family: te needs Transformer Engine, which is not installed; {install}.")
    if device.type != "cuda":
        raise ConfigError(f"model.family: te needs a CUDA device, but this is {device.type}; {ours}.")
    try:
        import transformer_engine.pytorch as te

        works = _wrappers().HAVE_TE
        reason: Any = "megatron-core could not import it"
        if works and recipe != "none":
            works, reason = getattr(te, SUPPORTED_BY[recipe])(return_reason=True)
    except (ImportError, OSError, AttributeError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"model.family: Transformer Engine is installed but does not load ({error}); re{install}."
        ) from error
    if not works and recipe == "none":
        raise ConfigError(f"model.family: Transformer Engine is installed but does not load ({reason}); re{install}.")
    if not works:
        raise ConfigError(
            f"model.fp8_recipe: {recipe} cannot run here ({str(reason).rstrip('.')}); set another one, or none."
        )


def _recipe(linear: Any, recipe: str) -> torch.nn.Module:
    """Have a linear of megatron-core's multiply in FP8 while it trains; evaluations are in the model's dtype."""
    if recipe != "none":
        from megatron.core.enums import Fp8Recipe

        mte = _wrappers()
        training = mte.TEQuantizationRecipe(
            fp8_quantization_recipe=Fp8Recipe(recipe), fp8_format=FORMATS[recipe], override_nonquantized_autocast=True
        )
        linear.te_quant_params = mte.TEQuantizationParams(training, evaluation_recipe=mte.TEQuantizationRecipe())
    built: torch.nn.Module = linear
    return built


def norm_column(*args: Any, recipe: str = "none", **kwargs: Any) -> torch.nn.Module:
    """A norm and the column-parallel linear behind it; arguments as `Linear`'s.

    Args:
        recipe: model.fp8_recipe.
    """
    return _recipe(_wrappers().TELayerNormColumnParallelLinear(*args, **kwargs), recipe)


def row(*args: Any, recipe: str = "none", **kwargs: Any) -> torch.nn.Module:
    """A row-parallel linear; see `norm_column`."""
    return _recipe(_wrappers().TERowParallelLinear(*args, **kwargs), recipe)


def norm(*args: Any, **kwargs: Any) -> torch.nn.Module:
    """A norm that stands alone, built as megatron-core builds it."""
    built: torch.nn.Module = _wrappers().TENorm(*args, **kwargs)
    return built


def norm_inside(linear: torch.nn.Module) -> bool:
    """Whether a linear normalizes its input itself; from then on it also returns it normalized: (output, normed)."""
    inside = hasattr(linear, "layer_norm_weight")
    if inside:
        linear.return_layernorm_output = True  # type: ignore[assignment]
    return inside
