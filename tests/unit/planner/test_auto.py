"""`parallel: auto`, a doomed run and one that ran out of memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.errors import ConfigError
from pipeline.config.run import RunConfig
from pipeline.config.sections import ModelConfig
from pipeline.config.yaml_file import dump_config, load_config
from pipeline.planner.auto import RECORD, Device, plan_record, settle
from pipeline.planner.choose import candidates
from pipeline.planner.doomed import doomed, out_of_memory
from pipeline.planner.explain import ways_out
from pipeline.planner.footprint import footprint
from pipeline.planner.gpus import find_gpu
from pipeline.planner.models import find_model
from pipeline.planning.memory import GIB
from pipeline.planning.run_plan import RunPlan

H100 = Device("NVIDIA H100 80GB HBM3", int(79.1 * GIB), 8, 2048 * GIB, 9.0)
LLAMA2_70B = find_model("llama2-70b").arch


def auto_config(folder: Path, extra: str = "parallel: auto") -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(
        f"model: {{path: models/Llama-2-70b-hf, context: 32768}}\ndata: {{path: text}}\n"
        f"train: {{steps: 10}}\noutput: {folder / 'run'}\n{extra}\n"
    )
    return load_config(path)


def load_config_of(folder: Path, extra: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(
        "model: {path: models/Llama-2-70b-hf, context: 32768}\ndata: {path: text}\n"
        f"output: {folder / 'run'}\n{extra}\n"
    )
    return load_config(path)


def test_the_word_is_read_written_and_alone(tmp_path: Path) -> None:
    config = auto_config(tmp_path)
    assert config.parallel.auto and load_config(tmp_path / "run.yaml", ["parallel=auto"]) == config
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config
    assert auto_config(tmp_path, "parallel: {auto: true, timeout_s: 60}").parallel.timeout_s == 60
    for other in ("cp: 2", "engine: zero3", "offload: {params: cpu}"):
        with pytest.raises(ConfigError, match=r"parallel\.auto: the planner chooses"):
            auto_config(tmp_path, f"parallel: {{auto: true, {other}}}")
    with pytest.raises(ConfigError, match=r"model: expected a section"):
        load_config(tmp_path / "run.yaml", ["model=auto"])


def test_nothing_runs_on_a_layout_nobody_chose(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no layout was chosen"):
        RunPlan.shaped(auto_config(tmp_path), LLAMA2_70B, 8)


def test_a_resume_keeps_what_was_chosen_and_other_ranks_choose_anew(tmp_path: Path) -> None:
    config = auto_config(tmp_path)
    first = settle(config, LLAMA2_70B, H100, 8)
    assert first.auto and "chose zero3, CP8" in first.chosen
    assert first.config.parallel.cp == 8 and first.config.train.recompute == "pointwise"
    # On smaller GPUs the planner would choose otherwise: the record holds.
    small = Device("NVIDIA A100-SXM4-40GB", int(39.4 * GIB), 8, 2048 * GIB, 8.0)
    assert settle(config, LLAMA2_70B, small, 8).config.train.recompute == "auto"
    plan = RunPlan.shaped(first.config, LLAMA2_70B, 8)
    record = plan_record(plan, H100.site(8), auto=True)
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / RECORD
    path.write_text(json.dumps(record))
    again = settle(config, LLAMA2_70B, small, 8)
    assert again.config == first.config and "keeps what this run began with" in again.chosen
    other = settle(config, LLAMA2_70B, H100, 4)
    assert other.config.parallel.cp <= 4 and "before, on 8 ranks" in other.chosen
    for damaged in ("{", '{"auto": true}', json.dumps({**record, "layout": {"parallel": {"tp": 3}}})):
        path.write_text(damaged)
        found = settle(config, LLAMA2_70B, H100, 8)
        assert found.config == first.config and "could be kept" in found.chosen, damaged


def test_a_layout_of_the_users_is_left_alone_whatever_was_recorded(tmp_path: Path) -> None:
    config = auto_config(tmp_path, "parallel: {cp: 2}")
    assert settle(config, LLAMA2_70B, H100, 8).config is config


def test_gpus_without_a_description_and_cpus_are_planned_for(tmp_path: Path) -> None:
    config = auto_config(tmp_path)
    unknown = replace(H100, name="Some Future GPU")
    assert settle(config, LLAMA2_70B, unknown, 8).config == settle(config, LLAMA2_70B, H100, 8).config
    tiny = replace(LLAMA2_70B, hidden=64, ffn=128, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=100)
    short = replace(config, model=replace(config.model, context=8192))
    on_cpus = settle(short, tiny, Device("", 16 * GIB, 2, 16 * GIB, None), 2)
    assert on_cpus.config.parallel.offload.params == "none"


def test_host_memory_of_a_cpu_is_no_other_memory(tmp_path: Path) -> None:
    """Gate and up were parked in the memory that they would have left."""
    arch, config = find_model("llama2-7b").arch, auto_config(tmp_path)
    long = replace(config, model=replace(config.model, context=16384), train=replace(config.train, global_batch=1))
    chosen = [
        settle(long, arch, Device(name, 48 * GIB, 1, 192 * GIB, kind), 1).config.train.gate_up
        for name, kind in (("", None), ("NVIDIA H100 80GB HBM3", 9.0))
    ]
    assert chosen == ["gpu", "host"]


def test_a_doomed_run_is_told_and_one_that_may_fit_is_not(tmp_path: Path) -> None:
    site = H100.site(8)
    whole = RunPlan.shaped(auto_config(tmp_path, "parallel: {cp: 8}"), LLAMA2_70B, 8)
    said = doomed(whole, LLAMA2_70B, site)
    assert "most of it weights" in said and "engine: zero3" in said and "79.1" in said
    fits = RunPlan.shaped(settle(auto_config(tmp_path), LLAMA2_70B, H100, 8).config, LLAMA2_70B, 8)
    assert doomed(fits, LLAMA2_70B, site) == ""
    # The formula has missed by 4%: with a little less than what it says it cannot be sure, with much less it is.
    takes = footprint(fits, 8).allocated
    assert doomed(fits, LLAMA2_70B, replace(site, gpu=replace(site.gpu, memory=int(0.97 * takes)))) == ""
    assert doomed(fits, LLAMA2_70B, replace(site, gpu=replace(site.gpu, memory=int(0.94 * takes))))


def test_out_of_memory_shows_the_plan_and_what_would_have_fitted(tmp_path: Path) -> None:
    plan = RunPlan.shaped(settle(auto_config(tmp_path), LLAMA2_70B, H100, 8).config, LLAMA2_70B, 8)
    said = out_of_memory(plan, LLAMA2_70B, H100.site(8), 70 * GIB, 78 * GIB)
    kept = footprint(plan, 8).gpu["kept activations"] / GIB
    assert f"kept activations {kept:.1f}" in said and "allocated 70.0 and reserved 78.0" in said
    assert "would have fitted" in said and "cp: 4" in said and "train.recompute: gate_up" in said
    assert find_gpu("h100-80gb").memory == H100.memory


def test_a_setting_that_would_fit_is_one_that_can_be_set(tmp_path: Path) -> None:
    """What is told, written into the user's own YAML, is a layout that runs: other settings of his would forbid it."""
    tight = "parallel: {cp: 8}\ntrain: {steps: 10, recompute: auto, gate_up: host, gpu_gib: 60}"
    config = load_config_of(tmp_path, tight)
    told = doomed(RunPlan.shaped(config, LLAMA2_70B, 8, H100.memory), LLAMA2_70B, H100.site(8))
    setting = told[told.index("would fit (") + len("would fit (") : told.index("), or set parallel")]
    parallel, rest = setting.split("}, train.", 1) if "}, train." in setting else setting.split(", train.", 1)
    closing = "}" * (parallel.count("{") - parallel.count("}"))
    lines = [parallel + closing, *(f"train.{one}" for one in rest.split(", train."))]
    overrides = [line.replace(": ", "=", 1) for line in lines]
    (tmp_path / "run.yaml").write_text((tmp_path / "run.yaml").read_text().replace("parallel: {cp: 8}\n", ""))
    mended = load_config(tmp_path / "run.yaml", overrides)
    plan = RunPlan.shaped(mended, LLAMA2_70B, 8, H100.memory)
    assert footprint(plan, 8).gpu_total <= H100.memory and "gpu_gib" in setting


def test_settings_that_a_layout_forbids_leave_the_others(tmp_path: Path) -> None:
    """Such as gate and up in 8 bits, which only what keeps them knows, or a stream that some ranks do not divide."""
    for extra in ("gate_up: fp8, recompute: pointwise", "recompute: auto, gpu_gib: 40", "stream: 8192"):
        path = tmp_path / "run.yaml"
        auto_config(tmp_path, "attention: {group_size: 8192}\nparallel: auto")
        path.write_text(path.read_text().replace("steps: 10", f"steps: 10, {extra}"))
        found = settle(load_config(path), LLAMA2_70B, H100, 8)
        assert found.auto and "chose" in found.chosen, extra
    asked = load_config(path, ["train.stream=null", "train.recompute=pointwise", "train.gate_up=fp8"])
    kept = {one.plan.config.train.gate_up for one in candidates(asked, LLAMA2_70B, H100.site(8))}
    assert kept == {"fp8", "gpu"}


def test_a_resume_keeps_chosen_policies_and_streams(tmp_path: Path) -> None:
    """Also where the user's own settings are others than the layout's."""
    (tmp_path / "run").mkdir()
    small = replace(H100, memory=40 * GIB)
    for extra, stream in (("gate_up: fp8, recompute: pointwise", None), ("recompute: auto", None), ("", "auto")):
        auto_config(tmp_path, "attention: {group_size: 8192}\nparallel: auto")
        path = tmp_path / "run.yaml"
        path.write_text(path.read_text().replace("steps: 10", f"steps: 10, {extra}" if extra else "steps: 10"))
        changed = ["model.context=1048576"] if stream else []
        (tmp_path / "run" / RECORD).unlink(missing_ok=True)
        config = load_config(path, changed)
        first = settle(config, LLAMA2_70B, small, 8)
        assert first.config.train.stream == stream
        record = plan_record(RunPlan.shaped(first.config, LLAMA2_70B, 8, small.memory), small.site(8), auto=True)
        (tmp_path / "run" / RECORD).write_text(json.dumps(record))
        again = settle(config, LLAMA2_70B, small, 8)
        assert again.config == first.config and "keeps what this run began with" in again.chosen, extra
    asked = load_config(path, ["train.stream=16384"])
    assert settle(asked, LLAMA2_70B, small, 8).config.train.stream == 16384, "asked for since"


@pytest.mark.parametrize("context", [32768, 1 << 20])
def test_a_resume_under_a_cap_keeps_what_was_chosen_within_it(context: int, tmp_path: Path) -> None:
    """It was planned anew at every start, as if the cap had come since; and a stream took chunks for the whole GPU."""
    auto_config(tmp_path, "attention: {group_size: 8192}\nparallel: auto")
    words = [f"model.context={context}", "train.recompute=auto", "train.gpu_gib=60", "train.stream=auto"]
    arch, one = find_model("llama2-7b").arch, replace(H100, here=1)
    config = load_config(tmp_path / "run.yaml", words)
    first = settle(config, arch, one, 1)
    assert first.config.train.gpu_gib is None, "one policy for all layers, for which there is no cap to say"
    (tmp_path / "run").mkdir()
    plan = RunPlan.shaped(first.config, arch, 1, one.memory)
    assert plan.memory().gpu_total <= 60 * GIB
    (tmp_path / "run" / RECORD).write_text(json.dumps(plan_record(plan, one.site(1), auto=True)))
    again = settle(config, arch, one, 1)
    assert again.config == first.config and "keeps what this run began with" in again.chosen
    less = settle(load_config(tmp_path / "run.yaml", [*words, "train.gpu_gib=30"]), arch, one, 1)
    assert less.config != first.config and RunPlan.shaped(less.config, arch, 1).memory().gpu_total <= 30 * GIB


def test_a_refusal_says_what_would_fit_also_of_auto(tmp_path: Path) -> None:
    small = replace(H100, memory=8 * GIB)
    with pytest.raises(ConfigError) as error:
        settle(auto_config(tmp_path), LLAMA2_70B, small, 8)
    config = auto_config(tmp_path, "parallel: {cp: 1}")
    ways = [way.change for way in ways_out(config, LLAMA2_70B, small.site(8))]
    assert ways and f"it would fit with {', or '.join(ways)}" in str(error.value)


def test_an_evaluation_takes_the_layout_a_run_had_on_any_ranks(tmp_path: Path) -> None:
    config = auto_config(tmp_path)
    first = settle(config, LLAMA2_70B, H100, 8)
    (tmp_path / "run").mkdir()
    record = plan_record(RunPlan.shaped(first.config, LLAMA2_70B, 8), H100.site(8), auto=True)
    (tmp_path / "run" / RECORD).write_text(json.dumps(record))
    assert settle(config, LLAMA2_70B, H100, 1, resumes=False).config == first.config
    with pytest.raises(ConfigError, match="No layout fits"):
        settle(config, LLAMA2_70B, replace(H100, host=64 * GIB), 1)


def test_an_fp8_base_on_a_cpu_is_timed_and_recorded(tmp_path: Path) -> None:
    """Found by reading: rank 0 of every such run ended in a division by the rate that a CPU has not."""
    cpu, arch = Device("", 64 * GIB, 1, 64 * GIB, None), find_model("llama3-8b").arch
    config = replace(auto_config(tmp_path), model=ModelConfig("models/x", 8192, base="fp8"))
    chosen = settle(config, arch, cpu, 1).config
    parts = plan_record(RunPlan.shaped(chosen, arch, 1), cpu.site(1), auto=True)["seconds"]
    assert parts["products"] > 0


def test_a_gpu_that_nobody_described_is_judged_by_its_own_capability(tmp_path: Path) -> None:
    """An H100's rates stand in for its own; what it can multiply they do not say."""
    arch = find_model("llama3-8b").arch
    config = replace(auto_config(tmp_path), model=ModelConfig("models/x", 8192, base="fp8"))
    ampere = Device("NVIDIA RTX A6000", 48 * GIB, 8, 512 * GIB, 8.6)
    with pytest.raises(ConfigError, match=r"Hopper and newer\), which NVIDIA RTX A6000 lacks"):
        settle(config, arch, ampere, 8)
    assert settle(config, arch, replace(ampere, name="NVIDIA B300", capability=10.3), 8).chosen
