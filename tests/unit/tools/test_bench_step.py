"""What the step bench measures without a GPU: its plans and variants, and how a profile is summed up."""

from __future__ import annotations

import pytest

from parallel.errors import ConfigError
from pipeline.planning.memory import GIB
from pipeline.planning.recompute import RecomputePolicy
from pipeline.reporting.profile import Kernel, busy, kind_of, summary
from tools.bench import step


def test_variants_are_plans_of_one_command_line() -> None:
    _, args = step.parse(
        ["--cp", "8", "--engine", "zero3", "--offload", "--layers", "20", "--family", "local", "megatron"]
        + ["--set", "lora.rank=16", "--variant", "train.recompute=pointwise"]
        + ["--variant", "train.recompute=auto train.gpu_gib=20", "--micro-batches", "2"]
    )  # fmt: skip
    variants = list(step.variants_of(args))
    assert [variant.name for variant in variants] == [
        "train.recompute=pointwise",
        "train.recompute=auto, train.gpu_gib=20",
        "megatron, train.recompute=pointwise",
        "megatron, train.recompute=auto, train.gpu_gib=20",
    ]
    plans = [step.plan_of(args, variant, 8) for variant in variants]
    assert set(plans[0].recompute) == {RecomputePolicy.POINTWISE} != set(plans[1].recompute)
    for variant, plan in zip(variants, plans, strict=True):
        assert plan.config.model.family == variant.family
        assert plan.config.lora.rank == 16 and plan.config.parallel.offload.params == "cpu"
        assert plan.batch.accumulation == 2 and plan.arch.layers == 20 and plan.group == 8192
        # Rank 0 has no past: half the others' attention.
        assert plan.busiest_rank() == 7
    _, quantized = step.parse(["--base", "nf4"])
    assert step.plan_of(quantized, step.Variant("local"), 1).config.model.base == "nf4"
    with pytest.raises(ConfigError, match="model.base: nf4 is kept by our own linears"):
        step.plan_of(quantized, step.Variant("megatron"), 1)
    with pytest.raises(ConfigError, match="waits for others"):
        step.plan_of(step.parse(["--set", "parallel.pp=2"])[1], step.Variant("local"), 8)
    _, bare = step.parse([])
    assert [variant.name for variant in step.variants_of(bare)] == ["local"]


def test_a_plan_keeps_to_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """`recompute: auto` filled the whole card where PyTorch could have less of it, and ran out of memory."""
    monkeypatch.setattr("tools.support.gpu_cap.smallest_gpu", lambda: 139 * GIB)
    shape = ["--model", "llama2-7b", "--recompute", "auto", "--set", "train.gate_up=gpu"]

    def filled(*options: str) -> float:
        _, args = step.parse([*shape, *options])
        return step.plan_of(args, step.Variant("local"), 1).memory().gpu_total / GIB

    assert filled() > 90, "the case tells nothing where little fits"
    assert 60 < filled("--cap-gib", "79") <= 79


def test_a_profile_says_how_busy_each_stream_is() -> None:
    kernels = [
        Kernel("nvjet_tst_128x256", 7, 0, 4_000_000),
        Kernel("triton_swiglu", 7, 3_000_000, 5_000_000),
        Kernel("cudnn_generated_fort_native_sdpa_sm90_flash", 7, 8_000_000, 9_000_000),
        Kernel("Memcpy HtoD (Pinned -> Device)", 20, 1_000_000, 3_000_000),
    ]
    assert busy(kernels[:2]) == 5_000_000 and busy([]) == 0
    assert [kind_of(kernel.name).split()[0] for kernel in kernels] == ["products", "pointwise", "attention", "copies"]
    first, computing, copying = summary(kernels)
    assert first == "first to last kernel: 9.0 ms"
    assert "stream 7: busy 6.0 ms, idle 3.0 ms; products 4.0" in computing and "pointwise and other 2.0" in computing
    assert copying.startswith("stream 20: busy 2.0 ms, idle 7.0 ms") and summary([]) == ["no kernel ran"]
