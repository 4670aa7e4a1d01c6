"""The preflight's layout where the planner chooses it, and where it knows a faster one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.parallel import ParallelConfig
from pipeline.config.yaml_file import load_config
from pipeline.planner.auto import Device
from pipeline.planning.run_plan import RunPlan
from pipeline.preflight import layout, survey
from pipeline.preflight.survey import Launch
from tests.unit.preflight.test_preflight import A100, GIB, NODE, ROOT, tiny_run
from tools.preflight import weights_bytes
from tools.support.shapes import llama2


def test_a_layout_is_chosen_and_a_slow_one_is_told(tmp_path: Path) -> None:
    slow = ["parallel.cp=2", "train.recompute=full"]
    config, stored = load_config(ROOT / "launch/configs/llama2_70b_32k.yaml", slow), llama2("70b")
    node = Device(A100.name, A100.total, 8, 2048 * GIB, A100.capability)
    plan = RunPlan.shaped(config, stored, 8)
    (told,) = layout.faster(plan, stored, node, None)
    assert "cp: 8" in told and "less time a step" in told
    auto = load_config(ROOT / "launch/configs/llama2_70b_32k.yaml", ["parallel=auto"])
    chosen, finding = layout.settle_layout(auto, stored, node, 8)
    assert finding is not None and not finding.problem and chosen.parallel.cp == 8
    assert f"train.recompute: {chosen.train.recompute}" in told
    best = RunPlan.shaped(chosen, stored, 8)
    assert layout.faster(best, stored, node, None) == (), "nothing is faster than the best"
    for device, shape, lacking in ((None, stored, "GPUs"), (node, None, "a readable model")):
        found = layout.settle_layout(auto, shape, device, 8)[1]
        assert found is not None and lacking in found.problem
    small = layout.settle_layout(auto, stored, replace(node, memory=8 * GIB), 8)[1]
    assert small is not None and small.problem.startswith("No layout fits")


def test_the_survey_settles_auto_for_the_gpus_there_are(tmp_path: Path) -> None:
    config, _ = tiny_run(tmp_path)
    auto = replace(config, parallel=ParallelConfig(auto=True))
    found = {finding.name: finding for finding in survey.survey(auto, Launch(4), NODE, weights_bytes)}
    assert not found["Layout"].problem and found["Layout"].advice[0].startswith("parallel: auto chose")
    none = {finding.name: finding for finding in survey.survey(auto, Launch(4), replace(NODE, gpus=()), weights_bytes)}
    assert "nothing can be chosen without GPUs" in none["Layout"].problem


def test_a_base_that_the_gpus_cannot_multiply_is_a_row_of_the_table(tmp_path: Path) -> None:
    """Found by reading: the search for a faster layout raised the refusal, and no table was shown."""
    config, _ = tiny_run(tmp_path)
    config = replace(config, parallel=ParallelConfig(), model=replace(config.model, base="fp8"))
    found = {finding.name: finding for finding in survey.survey(config, Launch(1), NODE, weights_bytes)}
    assert f"e4m3 with a scale a row (Hopper and newer), which {A100.name} lacks" in found["Layout"].problem
    hopper = replace(NODE, gpus=(survey.Gpu("NVIDIA H200", 140 * GIB, 139 * GIB, 9.0),))
    found = {finding.name: finding for finding in survey.survey(config, Launch(1), hopper, weights_bytes)}
    assert not found["Layout"].problem


def test_packages_that_settings_ask_for_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny_run(tmp_path)[0], parallel=ParallelConfig())
    installed = dict[str, str]()
    monkeypatch.setattr(survey, "installed", installed.get)

    def found(family: str, backend: str) -> list[survey.Finding]:
        asked = replace(config.attention, backend=backend)
        return survey.check_packages(replace(config, model=replace(config.model, family=family), attention=asked))

    assert found("local", "auto") == []
    te, flash = found("te", "flash_attn_4")
    assert "model.family: te needs it, and it is not installed; install it beside a GPU" in te.problem
    assert "attention.backend: flash_attn_4 needs it, and it is not installed" in flash.problem
    installed |= {"transformer-engine": "2.20.2", "flash-attn": "2.8.3"}
    te, flash = found("te", "flash_attn_2")
    assert (te.problem, te.found, flash.problem, flash.found) == ("", "2.20.2", "", "2.8.3")
    assert not found("local", "flash_attn")[0].problem and found("local", "flash_attn_4")[0].problem
