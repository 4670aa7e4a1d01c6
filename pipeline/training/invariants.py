"""The run-time invariants of a training run (`checks: true`): which parameter must keep what."""

from __future__ import annotations

from parallel.health.replicas import Checked, RunChecks
from parallel.world.groups import Groups
from pipeline.model.rank_model import ModelPart
from pipeline.planning import tensors as names
from pipeline.training.optimizer import TrainableAdamW


def run_checks(groups: Groups, model: ModelPart, optimizer: TrainableAdamW) -> RunChecks:
    """Take note of the frozen weights as they are now; make it before the first step."""
    tied = model.arch.tied and groups.plan.pp > 1
    checked = []
    for name, parameter in model.canonical_parameters():
        if model.is_sharded(parameter):
            continue
        checked.append(
            Checked(
                # A fused frozen weight goes by the first of the tensors it holds.
                name=names.to_hf(name)[0][0],
                parameter=parameter,
                trained=parameter.requires_grad,
                starts_zero=name.endswith(".lora_B"),
                tied=tied and name == "embedding.weight",
            )
        )
    if model.shards is not None:
        checked += [Checked(name, share, trained=False, sharded=True) for name, share in model.shards.shares()]
    return RunChecks(groups, checked, optimizer.own_moments)
