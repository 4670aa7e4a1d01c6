"""The product a recomputation skips: gradients equal to the bit, and it is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from parallel.groups import destroy_groups, make_groups
from parallel.plan import plan_grid
from parallel.rank_env import RankEnv
from pipeline.model.arch import read_arch
from pipeline.model.tiled_linear import LastRowParallelLinear, _Row, recomputing
from pipeline.model.part import ModelPart
from pipeline.model.rope import plan_rope
from pipeline.schema import LoraConfig, RopeSettings
from tests.tiny_models import make_tiny


def _layer(x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, seen: list[bool], skip: bool) -> torch.Tensor:
    hidden = torch.tanh(x * gain)
    seen.append(recomputing())
    if skip and recomputing():
        output = _Row.apply(hidden, weight)
        output.detach().fill_(float("nan"))  # whatever lies in the memory must not matter
        return x + output
    return x + torch.nn.functional.linear(hidden, weight)


def _gradients(skip: bool) -> tuple[list[torch.Tensor], list[bool]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1, 8, generator=generator, requires_grad=True)
    gains = [torch.randn(8, generator=generator).requires_grad_() for _ in range(2)]
    weights = [torch.randn(8, 8, generator=generator) for _ in range(2)]
    seen: list[bool] = []
    hidden = x
    for gain, weight in zip(gains, weights, strict=True):
        hidden = checkpoint(_layer, hidden, gain, weight, seen, skip, use_reentrant=True)
    hidden.square().sum().backward()
    return [tensor.grad for tensor in (x, *gains) if tensor.grad is not None], seen


def test_gradients_equal_to_the_bit_whatever_the_skipped_values() -> None:
    found, seen = _gradients(skip=True)
    expected, _ = _gradients(skip=False)
    assert seen == [False, False, True, True]
    assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(bool(a.isfinite().all()) and bool(a.any()) for a in found)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapter"])
def test_the_layers_down_projection_is_the_one_that_skips(tmp_path: Path, adapted: bool) -> None:
    """Computed in a forward pass; in a forward inside a backward its values are never made, and gradients are right."""
    arch = read_arch(make_tiny(tmp_path, "llama2"))
    groups = make_groups(plan_grid(1, 1, 1, 1), RankEnv())
    try:
        lora = LoraConfig(rank=2, targets=("q", "down") if adapted else ("q",))
        model = ModelPart(arch, plan_rope(arch, RopeSettings(), 64), lora, groups, torch.float32, "full")
        down = model.stages[0].decoder.layers[0].mlp.linear_fc2
        assert isinstance(down, LastRowParallelLinear)
        with torch.no_grad():
            for parameter in down.parameters():
                parameter.normal_()
        down.weight.requires_grad_(False)
        x = torch.randn(3, 1, arch.ffn, requires_grad=True)
        expected = down(x)[0]
        (wanted,) = torch.autograd.grad(expected.sum(), x)
        seen: list[torch.Tensor] = []
        # Uninitialized memory is filled with NaN in this mode: what comes out shows whether it was computed.
        torch.use_deterministic_algorithms(True)

        def layer(values: torch.Tensor) -> torch.Tensor:
            seen.append(down(values)[0])
            return seen[-1]

        checkpoint(layer, x, use_reentrant=True).sum().backward()
        first, again = seen
        assert torch.equal(first, expected) and bool(again.isnan().all())
        assert x.grad is not None and torch.allclose(x.grad, wanted, rtol=1e-6)
    finally:
        torch.use_deterministic_algorithms(False)
        destroy_groups()
