"""What holds the planner against measured steps: points, straight lines, the fit, and a GPU's description."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from parallel.errors import ConfigError
from parallel.world.rank_env import RankEnv
from pipeline.config.sections import BASES, GATE_UP, RECOMPUTE
from pipeline.planner.footprint import footprint
from pipeline.planner.gpus import find_gpu
from pipeline.planner.layer_time import FITTED, Fitted
from pipeline.planning.memory import GIB
from pipeline.planning.recompute import RecomputePolicy
from pipeline.planning.run_plan import plan_run
from tests.support.tiny_models import make_tiny
from tools.bench.calibrate import description
from tools.bench.plan import GRID, _write_config, extended, main, measure_once, parse, read_grid, wanted
from tools.dry_run import prepare
from tools.support.plan_fit import FREE, fit
from tools.support.plan_points import Point, misses, read_points

EVERY = [*read_grid(GRID, None), *read_grid(GRID, 2)]


def test_the_grid_covers_what_was_asked_for() -> None:
    alone, real = read_grid(GRID, None), read_grid(GRID, 2)
    assert len(alone) >= 40 and len(real) >= 8 and read_grid(GRID, 3) == []
    points = [point for point, _ in alone]
    assert len({point.name for point, _ in EVERY}) == len(EVERY)
    assert {"llama2-7b", "llama3-8b", "llama2-13b", "llama2-70b"} == {point.model for point in points}
    assert {8192, 16384, 32768, 65536, 131072, 262144, 524288} == {point.context for point in points}
    plans = [point.plan() for point in points]
    assert {(plan.grid.tp, plan.grid.cp) for plan in plans} >= {(8, 1), (1, 8), (1, 2)}
    ways = {(plan.config.parallel.engine, plan.config.parallel.offload.params) for plan in plans}
    assert ways == {("megatron", "none"), ("zero3", "none"), ("zero3", "cpu")}
    words = {(plan.config.train.recompute, plan.config.train.gate_up) for plan in plans}
    assert {word for word, _ in words} == set(RECOMPUTE) and {where for _, where in words} == set(GATE_UP)
    assert {policy for plan in plans for policy in plan.recompute} == set(RecomputePolicy)
    assert {plan.config.model.base for plan in plans} == set(BASES) == {p.plan().config.model.base for p, _ in real}
    assert any(plan.stream for plan in plans) and any(point.plan().stream for point, _ in real)
    for point, (few, many) in EVERY:
        layers = point.plan().arch.layers
        assert 2 <= few < many <= layers or few == many == layers
        assert point.alone == ((point, (few, many)) in alone)
        mixed = point.set["recompute"] == "auto"
        assert not mixed or few == many, "of fewer layers it would be another mix"


@pytest.mark.parametrize(("point", "layers"), EVERY, ids=lambda value: getattr(value, "name", ""))
def test_every_point_of_the_grid_can_be_run(point: Point, layers: tuple[int, int], tmp_path: Path) -> None:
    """On an H200 and its 128 GiB of host memory: the run of either number of layers, made as on the GPU."""
    for number in dict.fromkeys(layers):
        small = replace(point, layers=number, gpu="h200")
        plan = small.plan()
        memory = footprint(plan, 1 if point.alone else 2)
        assert memory.gpu_total <= find_gpu("h200").memory and memory.machine <= 128 * GIB
        assert small.predicted()["seconds"] > 0
        folder = tmp_path / str(number)
        _write_config(folder / "base", plan.arch)
        (folder / "tokens").mkdir()
        config = replace(plan.config, model=replace(plan.config.model, path=str(folder / "base")))
        changed, _, _ = prepare(config, folder, point.ranks, 2, write=False)
        again = plan_run(changed, point.ranks, find_gpu("h200").memory)
        assert (again.grid, again.stream, again.recompute) == (plan.grid, plan.stream, plan.recompute)


def test_the_grid_is_measured_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--estimate"]) == 0
    told = capsys.readouterr().out
    assert all(point.name in told for point, _ in EVERY)
    assert f"{len(read_grid(GRID, None))} points on one GPU: about" in told
    file = tmp_path / "measured.json"
    first = EVERY[0][0]
    file.write_text("- " + json.dumps({**asdict(first), "seconds": 1.0}) + "\n")
    assert main(["--estimate", "--json", str(file), "--only", "70B"]) == 0
    rest = capsys.readouterr().out
    assert f"  {first.name}\n" not in rest and EVERY[1][0].name in rest and "7B 8k" not in rest.replace("70B", "")
    command = parse(["--json", str(file), "--only", EVERY[1][0].name])
    assert [point.name for point, _ in wanted(command, None)] == [EVERY[1][0].name]


def test_a_straight_line() -> None:
    assert extended({"seconds": 3.0}, {"seconds": 5.0}, (2, 4), 80) == {"seconds": 81.0}
    assert extended({"seconds": 3.0}, {"seconds": 3.0}, (80, 80), 80) == {"seconds": 3.0}


def test_a_point_is_measured_by_the_real_trainer(tmp_path: Path) -> None:
    make_tiny(tmp_path, "llama2")
    point = Point("tiny", str(tmp_path), 2, 64, {"cp": 2, "recompute": "none", "engine": "zero3"}, "held", alone=True)
    assert measure_once(point, 1, RankEnv(), steps=1)["seconds"] > 0


def seconds_of(point: Point, constants: Fitted) -> float:
    return point.step_seconds(point.plan(), find_gpu(point.gpu), constants)


def test_constants_are_found_again() -> None:
    """Points made with other constants: the fit finds these, or as good ones."""
    planted = replace(FITTED, products=0.8, attention=0.5, memory=0.6, links=0.3, host_elements=1.5e8)
    points = [replace(p, use="fit", seconds=seconds_of(p, planted)) for p in read_points()]
    found = fit(points)
    for point in points:
        assert seconds_of(point, found) == pytest.approx(point.seconds, rel=0.02), point.name
    assert found.links == pytest.approx(0.3, rel=0.05) and found.products == pytest.approx(0.8, rel=0.05)


def test_the_shipped_constants_are_those_of_the_shipped_points() -> None:
    """Within what the points can tell: no point's time changes by 3% with a new fit."""
    points = read_points()
    again = fit(points, replace(FITTED, products=0.8, attention=0.5, memory=0.6, links=0.3))
    assert set(FREE) <= set(FITTED.__dataclass_fields__)
    for point in points:
        assert seconds_of(point, again) == pytest.approx(seconds_of(point, FITTED), rel=0.03), point.name


def test_check_reads_what_a_measurement_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "points.yaml"
    entry = {"name": "one: two", "model": "llama2-7b", "ranks": 1, "context": 8192, "set": {"recompute": "none"}}
    path.write_text("- " + json.dumps(entry | {"use": "held", "seconds": 1.0, "allocated": 30.0}) + "\n")
    assert main(["--check", str(path)]) == 0
    told = capsys.readouterr().out
    assert "one: two" in told and "seconds, only predicted: 1 points" in told
    (seconds, allocated) = misses(read_points(path))
    assert seconds.relative == pytest.approx(seconds.predicted - 1) and allocated.what == "allocated"
    path.write_text("- {name: x, colour: blue}")
    with pytest.raises(ConfigError, match="entry 1: is no measured step"):
        read_points(path)


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "Some Future GPU"])
def test_a_description_is_one_the_planner_reads(tmp_path: Path, device: str) -> None:
    found = {"bf16": 7e14, "hbm": 2.7e12, "pcie": 5e10, "nvlink": 3e11}
    path = tmp_path / "gpu.yaml"
    path.write_text(yaml.safe_dump({"mine": description(found, device, 79 * GIB, 8, 2048 * GIB, 9.0)}))
    gpu = find_gpu(str(path))
    assert gpu.capability == 9.0 and gpu.memory == 79 * GIB and gpu.host == 256 * GIB and gpu.rate("bf16") == 7e14
    assert gpu.sold["nvlink"] == (4.5e11 if "H100" in device else 3e11) and gpu.gpus_a_node == 8
    assert gpu.sold["network"]


@pytest.mark.parametrize("module", ["plan", "calibrate"])
def test_without_a_gpu_it_is_one_sentence(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib

    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU to measure")
    assert importlib.import_module(f"tools.bench.{module}").main([]) == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err
