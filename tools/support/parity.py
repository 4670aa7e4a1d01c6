"""What a run computes in its first steps, whole and under canonical names, to compare one grid with another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from parallel.world.groups import destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline.build import build
from pipeline.config.run import RunConfig
from pipeline.model.weights.gather import gather
from pipeline.model.weights.load import trainable
from pipeline.planning.run_plan import plan_run
from pipeline.training.reduction import main_grad
from pipeline.training.run_record import Run
from pipeline.training.state import whole_state


@dataclass
class Observed:
    """The first steps of a run, on rank 0; other ranks hold the scalars only."""

    losses: list[float] = field(default_factory=list)
    """Mean loss of every step and of the one after the last update, nats."""
    norms: list[float] = field(default_factory=list)
    """Gradient norms of the same, before clipping."""
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of the first step, fp32, whole."""
    gradients_after: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of the step after the last update."""
    trained: dict[str, torch.Tensor] = field(default_factory=dict)
    """fp32 masters after the last step."""
    frozen_kept: bool = True
    """No frozen weight of this rank changed by a bit."""


@dataclass(frozen=True)
class Difference:
    """How far one grid is from the reference; errors are relative."""

    loss: float
    """Largest over the steps."""
    norm: float
    gradient: float
    """Worst tensor, before and after the updates: norm of the difference over norm of the reference."""
    worst: str
    """Its name."""
    trained: float
    """Like `gradient`, of the trained weights after the last step."""


def frozen_hash(run: Run) -> str:
    """SHA-256 of this rank's frozen weights."""
    digest = hashlib.sha256()
    for _, tensor in run.trainer.parts.model.frozen():
        if tensor.numel():
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _nothing(run: Run) -> None: ...


def observe(
    config: RunConfig,
    env: RankEnv,
    steps: int,
    keep_world: bool = True,
    before: Callable[[Run], None] = _nothing,
    after: Callable[[Run], None] = _nothing,
) -> Observed:
    """Build the run of `config` on this process's grid and take `steps` optimizer steps; collective.

    Args:
        config: its output folder must hold no checkpoint.
        keep_world: leave torch.distributed up for another grid.
        before: called with the run as it was built, on every rank.
        after: called after the last update and the gradients that follow it.
    """
    found = Observed()
    run = build(plan_run(config, env.world_size), env)
    try:
        trainer, parts, kinds = run.trainer, run.trainer.parts, config.train.trainable
        frozen = frozen_hash(run)
        before(run)
        for step in range(steps):
            row = trainer.gradients(step)
            if step == 0:
                found.gradients = gather(parts.model, kinds, _gradients(run))
            trainer.update(step, row)
            found.losses.append(row["loss"])
            found.norms.append(row["grad_norm"])
        row = trainer.gradients(steps)
        found.losses.append(row["loss"])
        found.norms.append(row["grad_norm"])
        found.gradients_after = gather(parts.model, kinds, _gradients(run))
        found.trained = whole_state(parts.model, kinds, parts.optimizer)[0]
        after(run)
        found.frozen_kept = frozen_hash(run) == frozen
    finally:
        run.trainer.parts.loader.close()
        # Memory still page-locked when it is freed would be in the way of the next run of these processes.
        run.trainer.parts.saver.close()
        run.trainer.parts.model.close()
        destroy_groups(keep_world=keep_world)
    return found


def _gradients(run: Run) -> dict[str, torch.Tensor]:
    parts = run.trainer.parts
    by_id = {id(parameter): main_grad(parameter) for parameter in parts.model.parameters() if parameter.requires_grad}
    return {name: by_id[id(parameter)] for name, _, parameter in trainable(parts.model)}


def compare(found: Observed, reference: Observed) -> Difference:
    """Relative differences; NaN or a missing tensor is infinite."""

    def scalar(mine: list[float], theirs: list[float]) -> float:
        return max(_number(abs(a - b) / max(abs(b), 1e-30)) for a, b in zip(mine, theirs, strict=True))

    def tensors(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
        if mine.keys() != theirs.keys():
            return float("inf"), sorted(mine.keys() ^ theirs.keys())[0]
        errors = {
            name: _number(float((mine[name].double() - t.double()).norm() / t.double().norm().clamp_min(1e-30)))
            for name, t in theirs.items()
        }
        name = max(errors, key=lambda key: errors[key])
        return errors[name], name

    gradient, worst = max(
        tensors(found.gradients, reference.gradients), tensors(found.gradients_after, reference.gradients_after)
    )
    trained, _ = tensors(found.trained, reference.trained)
    return Difference(
        loss=scalar(found.losses, reference.losses),
        norm=scalar(found.norms, reference.norms),
        gradient=gradient,
        worst=worst,
        trained=trained,
    )


def _number(error: float) -> float:
    return error if error == error else float("inf")
