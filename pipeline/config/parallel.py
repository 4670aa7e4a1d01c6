"""The configuration's section on ranks: axes, engine, host memory; see `sections`."""

from __future__ import annotations

from dataclasses import dataclass, field

from parallel.errors import ConfigError
from pipeline.config.checks import at_least, between, one_of


@dataclass(frozen=True)
class OffloadConfig:
    """Where engine zero3 keeps what it shards, none (on the GPU) | cpu (in host memory), and when it is fetched."""

    params: str = "none"
    """Shards of the frozen weights; cpu pins them and copies a layer's share to the GPU before it is needed."""
    optimizer: str = "none"
    """fp32 masters and moments of what trains; cpu updates them there."""
    ahead: int = 2
    """Layers that are copied and gathered before they are needed; each has a buffer of its own on the GPU."""

    def __post_init__(self) -> None:
        for name in ("params", "optimizer"):
            value = getattr(self, name)
            if value == "nvme":
                raise ConfigError(
                    f"parallel.offload.{name}: nvme is not supported (DeepSpeed 0.19.8 fails at the second step when "
                    "weights are frozen); use cpu."
                )
            one_of(f"parallel.offload.{name}", value, ("none", "cpu"))
        between("parallel.offload.ahead", self.ahead, 1, 8)


AXES = ("tp", "cp", "pp", "virtual")


@dataclass(frozen=True)
class ParallelConfig:
    """The rank grid; data parallelism takes what tp x cp x pp leaves of the world."""

    tp: int = 1
    """Tensor-parallel ranks."""
    cp: int = 1
    """Context-parallel ranks."""
    pp: int = 1
    """Pipeline-parallel ranks."""
    virtual: int = 1
    """Pipeline chunks a rank; more than one runs the interleaved schedule."""
    engine: str = "megatron"
    """megatron (every rank holds its slice of the weights) | zero3 (DeepSpeed: frozen weights sharded over dp x cp)."""
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    """Host memory instead of the GPU's, for engine zero3."""
    auto: bool = False
    """Let the planner choose engine, axes, offload, train.micro_batch and train.recompute for the GPUs there are
    (`parallel: auto` for short); a resumed run keeps what was chosen."""
    timeout_s: float = 600.0
    """Seconds without progress on any rank after which the job ends; loading, evaluating and saving may take six times
    as long."""

    def __post_init__(self) -> None:
        at_least("parallel.timeout_s", self.timeout_s, 1)
        for axis in AXES:
            at_least(f"parallel.{axis}", getattr(self, axis), 1)
        one_of("parallel.engine", self.engine, ("megatron", "zero3"))
        chosen = any(getattr(self, axis) != 1 for axis in AXES) or self.engine != "megatron"
        if self.auto and (chosen or self.offload != OffloadConfig()):
            raise ConfigError("parallel.auto: the planner chooses the layout; remove the other settings of parallel.")
        if self.engine == "zero3" and self.pp > 1:
            raise ConfigError(
                f"parallel.pp: engine zero3 has no pipeline stages, got {self.pp}; use 1 and give the ranks to "
                "parallel.cp, or engine: megatron."
            )
        if self.engine == "zero3" and self.virtual > 1:
            raise ConfigError("parallel.virtual: engine zero3 has no pipeline stages to interleave; use 1.")
        if self.engine == "megatron" and self.offload != OffloadConfig():
            raise ConfigError(
                "parallel.offload: engine megatron keeps everything on the GPU; set parallel.engine: zero3, or remove "
                "it."
            )
