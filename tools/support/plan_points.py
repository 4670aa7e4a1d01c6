"""Measured steps, and what the planner says of the same: how far it is off, fitted and predicted points told apart."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from parallel.errors import ConfigError
from pipeline.config.parallel import OffloadConfig, ParallelConfig
from pipeline.config.run import RunConfig
from pipeline.config.sections import AttentionConfig, DataConfig, ModelConfig, TrainConfig
from pipeline.planner.clock import step_time
from pipeline.planner.footprint import footprint
from pipeline.planner.gpus import Gpu, find_gpu
from pipeline.planner.layer_time import FITTED, Fitted
from pipeline.planner.models import find_model
from pipeline.planning.memory import GIB
from pipeline.planning.run_plan import RunPlan

POINTS = Path(__file__).parents[1] / "bench" / "points.yaml"
MEASURED = ("seconds", "allocated", "reserved", "host")
"""Seconds of a step; GiB of one GPU, twice, and of one process's host memory."""


@dataclass(frozen=True)
class Point:
    """One measured step."""

    name: str
    model: str
    ranks: int
    context: int
    set: dict[str, Any]
    """tp cp pp engine recompute gate_up gpu_gib attention group micro_batch base family fp8_recipe stream without;
    micro_batches: of a rank and step (default: as many as stages); of parallel.offload what is not the default."""
    use: str
    """fit (the constants know its time) | held (they do not) | open (nor do they, and the time is far off)."""
    layers: int | None = None
    rank: int | None = None
    """Whose step; None: the busiest rank's."""
    alone: bool = False
    """One GPU stood in for that rank: nothing was sent."""
    one_thread: bool = False
    """It ran under torchrun alone, which leaves a rank one CPU thread."""
    seconds: float | None = None
    allocated: float | None = None
    reserved: float | None = None
    host: float | None = None
    source: str = ""
    gpu: str = "h100-80gb"

    def plan(self) -> RunPlan:
        """The plan of the step that was measured."""
        chosen = self.set
        offload = OffloadConfig(**{f.name: chosen[f.name] for f in fields(OffloadConfig) if f.name in chosen})
        axes = {axis: chosen.get(axis, 1) for axis in ("tp", "cp", "pp")}
        parallel = ParallelConfig(**axes, engine=chosen.get("engine", "megatron"), offload=offload)
        micro = chosen.get("micro_batch", 1)
        replicas = self.ranks // (axes["tp"] * axes["cp"] * axes["pp"])
        train = TrainConfig(
            steps=1,
            global_batch=micro * replicas * chosen.get("micro_batches", axes["pp"]),
            micro_batch=micro,
            recompute=chosen["recompute"],
            gate_up=chosen.get("gate_up", "gpu"),
            gpu_gib=chosen.get("gpu_gib"),
            stream=chosen.get("stream"),
            without=tuple(chosen.get("without", ())),
        )
        found = find_model(self.model)
        arch = found.arch if self.layers is None else replace(found.arch, layers=self.layers)
        attention = AttentionConfig(chosen.get("attention", "s2"), group_size=chosen.get("group"))
        named = {key: chosen[key] for key in ("base", "family", "fp8_recipe") if key in chosen}
        model = ModelConfig(found.path, self.context, **named)
        config = RunConfig(model, DataConfig("tokens"), train, "run", attention=attention, parallel=parallel)
        return RunPlan.shaped(config, arch, self.ranks)

    def step_seconds(self, plan: RunPlan, gpu: Gpu, fitted: Fitted = FITTED) -> float:
        """What the planner says of the step's time.

        Args:
            plan, gpu: the point's own.
        """
        return step_time(plan, gpu, fitted, alone=self.alone, rank=self.rank, one_thread=self.one_thread).total

    def predicted(self) -> dict[str, float]:
        """What the planner says, by the names of MEASURED."""
        plan, gpu = self.plan(), find_gpu(self.gpu)
        memory = footprint(plan, gpu.gpus_a_node)
        return {
            "seconds": self.step_seconds(plan, gpu),
            "allocated": memory.allocated / GIB,
            "reserved": memory.reserved / GIB,
            "host": memory.resident / GIB,
        }


@dataclass(frozen=True)
class Miss:
    """One measured quantity and the planner's."""

    point: Point
    what: str
    """One of MEASURED."""
    measured: float
    predicted: float

    @property
    def relative(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1


def read_points(file: Path = POINTS) -> list[Point]:
    """The points of a file.

    Raises:
        ConfigError: an entry is none.
    """
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8")) or []
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML ({str(error).splitlines()[0]}).") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{file}: is no list of measured steps; see {POINTS.name} beside tools.bench.plan.")
    found = []
    for number, entry in enumerate(entries):
        try:
            found.append(Point(**entry))
            if "recompute" not in found[-1].set:
                raise TypeError("set: recompute is missing")
        except TypeError as error:
            raise ConfigError(f"{file}, entry {number + 1}: is no measured step ({error}).") from None
    return found


def misses(points: Iterable[Point]) -> list[Miss]:
    """Every quantity that was measured."""
    found = []
    for point in points:
        predicted = point.predicted()
        for what in MEASURED:
            measured = getattr(point, what)
            if measured is not None:
                found.append(Miss(point, what, measured, predicted[what]))
    return found


def summary(found: Sequence[Miss], what: str, use: str | None = None) -> tuple[float, float, int]:
    """(median, worst, number) of the absolute relative misses of one quantity, of one use or all."""
    sizes = [abs(miss.relative) for miss in found if miss.what == what and use in (None, miss.point.use)]
    return (statistics.median(sizes), max(sizes), len(sizes)) if sizes else (0.0, 0.0, 0)
