"""`train.recompute: auto` fills the memory there is, computes less again the more there is, and never overfills it."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import pytest

from parallel.errors import ConfigError
from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import load_config
from pipeline.planner.clock import step_time
from pipeline.planner.gpus import find_gpu
from pipeline.planning.activations import layer_memory, peak_of
from pipeline.planning.arch import LlamaArch
from pipeline.planning.fill_memory import costs
from pipeline.planning.memory import GIB, estimate_memory
from pipeline.planning.recompute import RecomputePolicy
from pipeline.planning.run_plan import RunPlan, plan_model
from tools.support.shapes import llama2

FULL, GATE_UP, HOST, FP8, POINTWISE, NONE = RecomputePolicy
CONFIGS = Path(__file__).parents[3] / "launch/configs"
CP8 = ["parallel.cp=8", "train.recompute=auto", "attention.full_last_steps=0"]


def _planned(
    settings: list[str], arch: LlamaArch, ranks: int, name: str = "llama2_70b_32k", gpu: int | None = None
) -> RunPlan:
    config = load_config(CONFIGS / f"{name}.yaml", settings)
    return RunPlan.of(config, *plan_model(config.model, arch), ranks, gpu)


def _cost(plan: RunPlan) -> float:
    each = costs(plan.arch, plan.group)
    return sum(each[policy] for policy in plan.recompute)


def test_more_memory_is_less_work_and_what_is_planned_fits() -> None:
    arch, found = llama2("70b"), []
    for gib in (12, 20, 30, 40, 50, 60, 66, 72, 80):
        plan = _planned([*CP8, f"train.gpu_gib={gib}"], arch, 8)
        total = plan.memory().gpu_total
        if gib > 12:
            assert total <= gib * GIB
        if NONE not in plan.recompute[:1]:
            # No room is left that one more layer's gate and up would take.
            assert total > gib * GIB - layer_memory(plan.layer).kept[NONE]
        found.append(_cost(plan))
    assert all(more <= less for less, more in pairwise(found)) and found[0] > found[4] > found[-1] == 0
    # Where not even full recompute fits, full is what preflight will then refuse.
    assert set(_planned([*CP8, "train.gpu_gib=12"], arch, 8).recompute) == {FULL}


@pytest.mark.parametrize("gib", [2.6, 3.0, 3.4, 4.0])
def test_nothing_that_fits_is_better(gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every assignment of policies to five layers."""
    monkeypatch.setattr("pipeline.planning.memory.CUDA_CONTEXT", 0)
    arch = llama2("7b", 5)
    settings = ["train.recompute=auto", f"train.gpu_gib={gib}", "model.context=8192", "train.trainable=[lora]"]
    settings += ["parallel.engine=zero3", "parallel.offload.params=cpu"]
    plan = _planned(settings, arch, 1, "llama2_7b_32k")
    each = costs(arch, plan.group)

    def fits(config: RunConfig, policies: tuple[RecomputePolicy, ...]) -> bool:
        return estimate_memory(config, plan.layer, plan.grid, policies).gpu_total <= gib * GIB

    kinds = (FULL, GATE_UP, POINTWISE, NONE)
    least = min(sum(each[p] for p in mix) for mix in product(kinds, repeat=5) if fits(plan.config, mix))
    # A mix of two kinds can be one layer's step away from the best of all.
    assert fits(plan.config, plan.recompute) and _cost(plan) <= least + max(each[GATE_UP], each[FULL] - each[GATE_UP])


def test_mixes_that_cannot_win_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most numbers of parked layers and pairs of kinds lose at a glance: of 402 looks 300 and more were in vain."""
    looks: list[int] = []

    def counted(*args: object) -> object:
        looks.append(1)
        return estimate_memory(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("pipeline.planning.fill_memory.estimate_memory", counted)
    plan = _planned(
        ["train.recompute=auto", "train.gpu_gib=70", "train.gate_up=host"], llama2("7b"), 1, "llama2_7b_32k"
    )
    assert HOST in plan.recompute and len(looks) < 150


def test_layers_that_run_again_come_first_where_their_peak_is_lowest() -> None:
    arch = llama2("70b")
    plan = _planned([*CP8, "train.gpu_gib=25"], arch, 8)
    order = list(RecomputePolicy)
    places = [order.index(policy) for policy in plan.recompute]
    assert places == sorted(places) and len(set(places)) == 2
    layer = layer_memory(plan.layer)
    assert sum(peak_of(layer, plan.recompute)) <= sum(peak_of(layer, plan.recompute[::-1]))


def test_stages_and_interleaved_chunks_get_one_mix_each() -> None:
    arch = llama2("70b")
    settings = ["parallel.engine=megatron", "parallel.offload.params=none", "parallel.offload.optimizer=none"]
    settings += ["parallel.tp=4", "parallel.cp=1", "parallel.pp=2", "parallel.virtual=2", *CP8[1:], "train.gpu_gib=70"]
    plan = _planned(settings, arch, 8)
    stages = [[plan.recompute[i] for chunk in plan.chunks[stage::2] for i in chunk] for stage in (0, 1)]
    assert stages[0] == stages[1] and len(set(stages[0])) == 2 and plan.memory().gpu_total <= 70 * GIB
    # Found by reading: the first so many layers of the model were counted, of which interleaving gives a stage some.
    whole = _planned([*settings, "parallel.virtual=1"], arch, 8)
    again = [step_time(one, find_gpu("h100-80gb")).parts["recompute"] for one in (plan, whole)]
    assert plan.memory() == whole.memory() and again[0] == pytest.approx(again[1])


def test_gate_and_up_elsewhere_only_where_asked_and_only_as_many_as_hide() -> None:
    arch, config = llama2("7b"), "llama2_7b_32k"
    base = ["train.recompute=auto", "train.gpu_gib=70"]
    plans = {word: _planned([*base, f"train.gate_up={word}"], arch, 1, config) for word in ("gpu", "fp8", "host")}
    assert not {HOST, FP8} & set(plans["gpu"].recompute) and FP8 in plans["fp8"].recompute
    hosts = [number for number, policy in enumerate(plans["host"].recompute) if policy is HOST]
    assert 10 < len(hosts) < 32 and max(b - a for a, b in pairwise(hosts)) <= 3
    parked = plans["host"].memory().host["gate and up"]
    assert parked == len(hosts) * 32768 * 2 * 11008 * 2
    assert _cost(plans["host"]) < _cost(plans["gpu"]) > _cost(plans["fp8"])


def test_last_steps_of_full_attention_are_counted() -> None:
    """They gather all keys and values, of every layer: 10 GiB at this shape. And the first rank attends queries of the
    last one, which keeps x of its own, at which x (2 (c - 1) + x) = c."""
    arch = llama2("70b")
    plans = [
        _planned([*CP8, f"attention.full_last_steps={steps}", f"train.without=[{word}]"], arch, 8)
        for steps, word in ((0, ""), (10, "balanced_attention"), (10, ""))
    ]
    kept = [layer_memory(plan.layer).kept[POINTWISE] for plan in plans]
    gathered, halo = 32768 * 2 * 1024 * 2, 4096 * 2 * 512 * 2
    assert kept[1] - kept[0] == gathered - halo
    # Queries and outputs in bf16 and fp32 log-sum-exps.
    vectors = 64 * (2 * 128 * 2 + 4)
    assert (kept[2] - kept[1]) / vectors == pytest.approx(4096 * (8 - 57**0.5), abs=2)
    assert _cost(plans[1]) > _cost(plans[0])
    assert all(plan.memory().gpu_total <= 0.95 * 80e9 for plan in plans)


def test_settings_that_contradict_each_other_are_refused() -> None:
    for settings, told in (
        (["train.recompute=full", "train.gate_up=host"], "full keeps gate and up on the GPU or not at all"),
        (["train.recompute=none", "train.gate_up=fp8"], "none keeps"),
        (["train.recompute=none", "train.gpu_gib=40"], "only train.recompute auto"),
        (["train.recompute=half"], "is not one of full, gate_up, pointwise, none, auto"),
    ):
        with pytest.raises(ConfigError, match=told):
            load_config(CONFIGS / "llama2_7b_32k.yaml", settings)


def test_a_machine_without_a_gpu_plans_for_80_gb() -> None:
    sizes = (None, 80 * 10**9, 40 * 10**9)
    plans = [_planned(CP8, llama2("70b"), 8, gpu=size).recompute for size in sizes]
    assert plans[0] == plans[1] != plans[2]
