"""A whole model on Triton's kernels against the same one on eager operations: loss and every gradient."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pipeline.config.rope import RopeSettings
from pipeline.config.sections import LoraConfig
from pipeline.data.loader import Batch
from pipeline.model.layers import lora_functions, norm, rotary, swiglu
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import mark_trainable
from pipeline.planning.arch import read_arch
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.rope import plan_rope
from tests.support.interpreted import interpret
from tests.support.single import single_groups
from tests.support.tiny_models import make_tiny

ALL = ("q", "k", "v", "o", "gate", "up", "down")
# RoPE is a part of what cuts q, k and v, in a module of its own.
POINTWISE = {"swiglu", "swiglu_gradient_"}
# dtype, recompute, adapted, rank, trained, kernels that must have been used
CASES: list[tuple[torch.dtype, str, tuple[str, ...], int, tuple[str, ...], set[str]]] = [
    # No update: fp32 factors would be rounded.
    (torch.float32, "full", ALL, 4, ("lora", "embed", "norm"), POINTWISE | {"norm", "norm_of_sum", "norm_gradient"}),
    (
        torch.float16,
        "full",
        ALL[:4],
        4,
        ("lora", "embed", "norm"),
        POINTWISE | {"norm", "norm_of_sum", "norm_gradient", "add_update_"},
    ),
    # Fused projections' ranks, two and three times 96, are more than the kernel takes; o's and down's are not.
    (torch.float16, "none", ALL, 96, ("lora",), POINTWISE | {"norm", "norm_of_sum", "norm_gradient", "add_update_"}),
    (torch.float16, "none", ALL[:3], 96, ("norm",), POINTWISE | {"norm", "norm_of_sum", "norm_gradient"}),
]


@contextlib.contextmanager
def _on(kernels: Any) -> Iterator[None]:
    """Everything that asks gets these kernels, or None, wherever tensors are."""

    def kernels_for(first: torch.Tensor, *others: torch.Tensor) -> Any:
        return kernels if all(tensor.is_contiguous() for tensor in others) else None

    with contextlib.ExitStack() as stack:
        for module in (lora_functions, norm, rotary, swiglu):
            stack.enter_context(mock.patch.object(module, "kernels_for", kernels_for))
        yield


def _gradients(model: RankModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model.train().train_step([Batch(tokens, tokens, None)], AttentionSpec("s2", 16), 1 / tokens.numel())
    return {"loss": loss, **{name: p.grad for name, p in model.canonical_parameters() if p.grad is not None}}


def _model_agrees(dtypes: dict[torch.dtype, tuple[torch.dtype, float]]) -> None:
    """On the device at hand; every dtype of CASES stands for another one, and its tolerance."""
    from pipeline.model.layers import qkv_kernels
    from pipeline.model.layers import triton_kernels as kernels

    groups = single_groups()
    kinds = [("tinyllama", case) for case in CASES] + [(kind, CASES[1]) for kind in ("qwen3", "biased")]
    for kind, case in kinds:
        like, recompute, targets, rank, trained, wanted = case
        layers = 2 if case in CASES[:2] and kind == "tinyllama" else 1  # a layer after another, recomputed; interpreted
        with tempfile.TemporaryDirectory() as folder:
            arch = read_arch(make_tiny(Path(folder) / "base", kind, num_hidden_layers=layers))
        # Between the cut and RoPE stand norms there, which torch computes.
        cuts, wanted = (0, wanted | {"rotate"}) if arch.qk_norm else (arch.layers, wanted)
        tokens = torch.randint(0, arch.vocab, (2, 19), generator=torch.Generator().manual_seed(0))
        dtype, tolerance = dtypes[like]
        adapters = LoraConfig(rank=rank, targets=targets)
        model = RankModel(arch, plan_rope(arch, RopeSettings(), 64), adapters, groups, dtype, recompute)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.canonical_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.1).add_("norm" in name))
        mark_trainable(model, trained)
        used = mock.Mock(wraps=kernels)
        cut = mock.Mock(wraps=qkv_kernels._launch)
        with _on(used), mock.patch.object(qkv_kernels, "_launch", cut):
            found = _gradients(model, tokens)
        assert cut.call_count == cuts * (3 if recompute == "full" else 2)
        with _on(None):
            expected = _gradients(model, tokens)
        assert {call[0] for call in used.mock_calls} == wanted, (kind, dtype, recompute, targets)
        # The loss, and of norms at least the last one and each layer's two.
        assert found.keys() == expected.keys() and len(found) >= 2 + 2 * layers
        for name, tensor in expected.items():
            error = (found[name].double() - tensor.double()).norm() / tensor.double().norm()
            assert error <= tolerance, (kind, dtype, recompute, targets, name, float(error))


def _interpreted() -> None:
    _model_agrees({torch.float32: (torch.float32, 1e-5), torch.float16: (torch.float16, 1e-2)})


def test_interpreted() -> None:
    interpret("test_model_on_kernels._interpreted()")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    _model_agrees({torch.float32: (torch.float32, 1e-5), torch.float16: (torch.bfloat16, 3e-2)})
