"""The memory formula counts the model's parameters exactly and is near every peak that was measured."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import load_config
from pipeline.model.layers import loss
from pipeline.planning.activations import LOGITS
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.memory import CUDA_CONTEXT, GIB, PROCESS, MemoryEstimate, count_parameters
from pipeline.planning.run_plan import RunPlan, plan_model
from pipeline.planning.tensors import adapter_shapes, hf_tensor_shapes
from pipeline.planning.tile_size import tile_tokens
from tests.support.tiny_models import KINDS, make_tiny
from tools.support.shapes import llama2

LLAMA2_70B = llama2("70b")
CONFIG = Path(__file__).parents[3] / "launch/configs/llama2_70b_32k.yaml"
OLD = ["parallel.cp=2", "train.recompute=full", "parallel.offload={params: cpu, optimizer: cpu, ahead: 1}"]
"""The layout that was measured, and shipped until recompute auto."""
MEGATRON = [*OLD, "parallel.engine=megatron", "parallel.offload={}"]


def estimate_of(config: RunConfig, arch: LlamaArch, ranks: int) -> MemoryEstimate:
    return RunPlan.of(config, *plan_model(config.model, arch), ranks).memory()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trains", ["[lora, embed, norm]", "[lora]", "[lora, lm_head]"])
def test_parameters_are_counted_as_the_checkpoint_names_them(tmp_path: Path, kind: str, trains: str) -> None:
    biased = {} if kind == "mistral" else {"attention_bias": True, "mlp_bias": True}
    arch = read_arch(make_tiny(tmp_path, kind, **biased))
    config = load_config(CONFIG, [f"train.trainable={trains}", "lora.targets=[q, v, o, down]"])
    counts = count_parameters(config, arch)
    base = {name: prod(shape) for name, shape in hf_tensor_shapes(arch).items()}
    adapters = sum(map(prod, adapter_shapes(arch, config.lora).values()))
    frozen = arch.layers * counts.layer + counts.head + counts.embedding + counts.norms
    assert frozen + counts.trained == sum(base.values()) + adapters
    trained = [
        name
        for name in base
        if ("embed" in trains and "embed_tokens" in name)
        or (", norm" in trains and "norm" in name)
        or ("lm_head" in trains and "lm_head" in name)
    ]
    assert counts.trained == adapters + sum(base[name] for name in trained)


def test_the_papers_count_for_70b() -> None:
    assert round(count_parameters(load_config(CONFIG), LLAMA2_70B).trained / 1e6, 1) == 296.2


@pytest.mark.parametrize(
    ("settings", "layers", "ranks", "measured"),
    [
        ([*MEGATRON, "parallel.tp=8", "parallel.cp=1"], 80, 8, 22.69),
        ([*MEGATRON, "parallel.tp=2", "parallel.cp=1"], 20, 2, 26.76),
        ([*MEGATRON, "parallel.tp=2", "parallel.cp=1"], 12, 2, 17.79),
        (MEGATRON, 20, 2, 43.11),
        (OLD, 80, 2, 26.93),
        (OLD, 80, 8, 26.93),
    ],
    ids=["TP8", "TP2", "TP2, 12 layers", "CP2", "zero3 CP2 of 2, offload", "zero3 CP2 of 8, offload"],
)
def test_near_the_peaks_in_results(settings: list[str], layers: int, ranks: int, measured: float) -> None:
    """docs/RESULTS.md, Llama-2-70B at 32k; PyTorch's peaks do not see CUDA's context."""
    config = load_config(CONFIG, [*settings, "attention.full_last_steps=0"])
    estimate = estimate_of(config, llama2("70b", layers), ranks)
    assert (estimate.gpu_total - CUDA_CONTEXT) / GIB == pytest.approx(measured, rel=0.035)


@pytest.mark.parametrize(
    ("name", "settings", "ranks", "measured"),
    [
        ("70b_32k", ["parallel.cp=8", "parallel.offload.ahead=1"], 8, 67.4 + 80 * 4096 * 8192 * 2 / GIB),
        ("7b_32k", ["model.context=16384"], 1, 65.0 + 32 * 16384 * 4096 * 2 / GIB),
    ],
)
def test_near_the_peaks_without_recompute(name: str, settings: list[str], ranks: int, measured: float) -> None:
    """docs/RESULTS.md, before `none` kept the norms' outputs too, which are added here."""
    config = load_config(
        CONFIG.parent / f"llama2_{name}.yaml", [*settings, "train.recompute=none", "attention.full_last_steps=0"]
    )
    estimate = estimate_of(config, llama2(name.split("_")[0]), ranks)
    assert (estimate.gpu_total - CUDA_CONTEXT) / GIB == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    ("recipe", "layers", "measured"), [("none", 4, 41.69), ("none", 8, 72.64), ("tensorwise", 8, 87.39)]
)
def test_near_the_peaks_of_transformer_engine(recipe: str, layers: int, measured: float) -> None:
    """docs/RESULTS.md, Llama-2-70B at 32k on one GPU, keeping `pointwise`."""
    settings = [
        *MEGATRON,
        "parallel.cp=1",
        "model.family=te",
        f"model.fp8_recipe={recipe}",
        "train.recompute=pointwise",
    ]
    config = load_config(CONFIG, [*settings, "attention.full_last_steps=0", "train.global_batch=1"])
    estimate = estimate_of(config, llama2("70b", layers), 1)
    assert (estimate.gpu_total - CUDA_CONTEXT) / GIB == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(("recompute", "measured"), [("full", 15.85), ("gate_up", 19.88), ("pointwise", 30.82)])
def test_near_the_peaks_where_a_layers_backward_is_most(recompute: str, measured: float) -> None:
    """docs/LOG.md, 2026-12-01: two layers of Llama-2-7B at 131,072 tokens, from the history of the allocations."""
    settings = ["model.context=131072", f"train.recompute={recompute}", "attention.full_last_steps=0"]
    config = load_config(CONFIG.parent / "llama2_7b_32k.yaml", settings)
    estimate = estimate_of(config, llama2("7b", 2), 1)
    assert (estimate.gpu_total - CUDA_CONTEXT) / GIB == pytest.approx(measured, rel=0.03)


def test_sizes_follow_the_models_rules() -> None:
    # Llama-2-70B's MLP: gate, up and two hidden states, over 1, 2 and 8 tensor ranks.
    widths = [2 * 28672 // ranks + 2 * 8192 for ranks in (1, 2, 8)]
    assert [tile_tokens(width, ranks) for width, ranks in zip(widths, (1, 2, 8), strict=True)] == [2048, 4096, 4274]
    assert LOGITS == 3 * 4 * loss.CHUNK_LOGITS


def test_zero3_cuts_frozen_weights_over_all_ranks_and_offload_moves_them_to_the_host() -> None:
    away = estimate_of(load_config(CONFIG, OLD), LLAMA2_70B, 8)
    here = estimate_of(
        load_config(CONFIG, [*MEGATRON, "parallel={engine: zero3, cp: 2}", "parallel.offload.ahead=1"]), LLAMA2_70B, 8
    )
    counts = count_parameters(load_config(CONFIG), LLAMA2_70B)
    shard = (80 * counts.layer + counts.head) * 2 // 8
    assert away.host["frozen weights, shard"] == here.gpu["frozen weights, shard"] == shard
    assert shard / GIB == pytest.approx(16.0, abs=0.01)
    moved = shard + 12 * counts.trained // 8
    assert here.gpu_total - away.gpu_total == moved == sum(away.host.values()) - sum(here.host.values())
    assert here.host == {"process": PROCESS}
    assert away.gpu["gathered weights"] == 2 * 2 * counts.layer, "the output matrix is smaller"


def test_context_parallelism_shrinks_activations_and_pipeline_stages_do_not_shrink_layer_inputs() -> None:
    # Queries of other ranks, in the last steps, would come to those of a shard.
    alone = [*OLD, "train.without=[balanced_attention]"]
    one, four = (estimate_of(load_config(CONFIG, [*alone, f"parallel.cp={cp}"]), LLAMA2_70B, 8).gpu for cp in (1, 4))
    assert one["layer inputs"] == 4 * four["layer inputs"] == 40 * GIB
    # The tiles of the MLP do not shrink.
    assert 3 < one["a layer or the loss at work"] / four["a layer or the loss at work"] <= 4
    stages = load_config(CONFIG, [*MEGATRON, "parallel.pp=8", "parallel.cp=1"])
    deep = estimate_of(stages, LLAMA2_70B, 8).gpu
    assert deep["layer inputs"] == 40 * GIB and deep["frozen weights"] < 17 * GIB
