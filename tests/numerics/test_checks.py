"""Run-time invariants: silent on a healthy run of any grid, and each planted violation told alike by every rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parallel.health.replicas import InvariantViolated, bit_sums
from parallel.world.groups import destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline.config.yaml_file import load_config
from pipeline.training.run_record import Run
from tests.numerics.test_parallel_parity import Grid, write_config
from tests.support.ranks import run_ranks
from tests.support.runs import build_run


def _find(run: Run, name: str) -> torch.Tensor:
    checks = run.trainer.parts.checks
    assert checks is not None
    return next(one.parameter for one in checks.parameters if one.name == name)


def _nudged(values: torch.Tensor, to: float | None = None) -> Callable[[], None]:
    """Move one element by a single unit in the last place (or to a value); returns what undoes it."""
    flat = values.detach().view(-1)
    before = flat[-1].clone()
    flat[-1] = torch.nextafter(before, before + 1) if to is None else to
    return lambda: flat[-1].copy_(before)


def _told(check: Callable[[], None]) -> str:
    """What a check says; empty if nothing."""
    try:
        check()
    except InvariantViolated as error:
        return str(error)
    return ""


def _violations(rank: int, world: int, path: str) -> dict[str, str]:
    """Plant every violation that this grid can have, one after another, in a healthy run that has taken two steps."""
    run = build_run(load_config(Path(path), ["checks=true"]), RankEnv.read())
    try:
        trainer, plan = run.trainer, run.groups.plan
        checks = trainer.parts.checks
        assert checks is not None
        tp, cp, dp, pp = plan.coordinates(rank)
        found = {}

        def plant(kind: str, here: bool, name: str, check: Callable[[], None], to: float | None = None) -> None:
            undo = _nudged(_find(run, name), to) if here else lambda: None
            found[kind] = _told(check)
            undo()
            found[f"{kind}, mended"] = _told(check)

        layer = f"model.layers.{0 if pp == 0 else 3}"
        own_norm, frozen = f"{layer}.input_layernorm.weight", f"{layer}.self_attn.q_proj.weight"
        last = tp == plan.tp - 1 and cp == plan.cp - 1 and dp == plan.dp - 1
        b_factor = f"{layer}.self_attn.q_proj.lora_B.weight"
        plant("B", rank == 1, b_factor, checks.check_adapters_start_at_zero, 1e-3)
        for step in range(2):
            trainer.update(step, trainer.gradients(step))  # after_step runs in it
        checks.before_save(2)
        plant("replica", last and pp == 0, own_norm, lambda: checks.after_step(2))
        plant("tp", tp == 1 and pp == 0, own_norm, lambda: checks.after_step(2))
        plant("frozen", last and pp == plan.pp - 1, frozen, lambda: checks.before_save(2))
        plant("weight", last and pp == 0, own_norm, lambda: checks.check_finite(2), float("nan"))
        plant("after a step", pp == 0, own_norm, lambda: checks.after_step(2), float("inf"))
        if run.trainer.parts.model.arch.tied and plan.pp > 1:
            end = pp in (0, plan.pp - 1)
            name = "model.embed_tokens.weight" if end else own_norm
            plant("tied", pp == plan.pp - 1, name, lambda: checks.after_step(2))
        moment_name, moment = next(iter(trainer.parts.optimizer.own_moments()))
        undo = _nudged(moment, float("inf")) if rank == world - 1 else lambda: None
        found["moment"] = _told(lambda: checks.before_save(2))
        undo()
        found["moment, mended"] = _told(lambda: checks.before_save(2))
        return found
    finally:
        run.trainer.parts.loader.close()
        destroy_groups(keep_world=True)


def _both(rank: int, world: int, paths: list[str]) -> list[dict[str, str]]:
    return [_violations(rank, world, path) for path in paths]


def test_every_planted_violation_is_told_by_all_ranks(tmp_path: Path) -> None:
    paths = [
        str(write_config(tmp_path, "untied", Grid(tp=2))),  # with dp 2
        str(write_config(tmp_path, "tied", Grid(pp=2, cp=2))),
    ]
    ranks = run_ranks(_both, 4, paths, timeout=200)
    for one in ranks[1:]:
        assert one == ranks[0], "every rank says the same"
    replicas, stages = ranks[0]
    for found in ranks[0]:
        assert not any(text for kind, text in found.items() if kind.endswith("mended")), found
    norm = "model.layers.0.input_layernorm.weight"
    assert replicas["replica"].startswith(f"Step 2, rank 3: {norm} is not bit-equal to its copy on rank 1 (data-")
    assert replicas["tp"].startswith(f"Step 2, rank 1: {norm} is not bit-equal to its copy on rank 0 (tensor-parallel")
    changed = "the frozen weight model.layers.0.self_attn.q_proj.weight changed since"
    assert replicas["frozen"].startswith(f"Step 2, rank 3: {changed}")
    assert stages["frozen"].startswith(f"Step 2, rank 3: {changed.replace('.0.', '.3.')}")
    assert replicas["weight"].startswith(f"Step 2, rank 3: {norm} holds a value that is not finite (1 such tensors)")
    assert replicas["after a step"].startswith(f"Step 2, rank 0: {norm} holds a value that is not finite")
    assert "Step 2, rank 3: model." in replicas["moment"] and ".exp_avg holds a value" in replicas["moment"]
    zero = "Step 0, rank 1: model.layers.0.self_attn.q_proj.lora_B.weight is not zero"
    assert replicas["B"].startswith(zero) and stages["B"].startswith(zero)
    assert stages["replica"].startswith(f"Step 2, rank 1: {norm} is not bit-equal to its copy on rank 0 (data-")
    assert not stages["tp"], "there is no tensor parallelism to be out of sync"
    assert stages["tied"].startswith("Step 2, rank 2: model.embed_tokens.weight is not bit-equal to its copy on rank 0")
    assert "first and last pipeline" in stages["tied"]
    assert all(text.count(";") >= 1 for text in replicas.values() if text), "each says what to do"


def test_a_violation_stops_one_process_before_it_saves(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, "untied", Grid()), ["checks=true", f"output={tmp_path / 'run'}"])
    run = build_run(config, RankEnv())
    trainer = run.trainer
    trainer.step = 1
    trainer.update(0, trainer.gradients(0))
    trainer.save()
    undo = _nudged(_find(run, "model.layers.0.mlp.down_proj.weight"))
    with pytest.raises(InvariantViolated, match=r"^Step 2, rank 0: the frozen weight model\.layers\.0\.mlp\.down"):
        trainer.step = 2
        trainer.save()
    undo()
    folders = [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir() if folder.is_dir()]
    assert folders == ["step-000001"], "nothing broken was written"
    run.trainer.parts.loader.close()
    destroy_groups()
    # A resumed run has B factors that are not zero, and may.
    resumed = build_run(config, RankEnv())
    assert resumed.trainer.step == 1
    assert bool(_find(resumed, "model.layers.0.self_attn.q_proj.lora_B.weight").detach().any())
    resumed.trainer.parts.loader.close()


def test_bit_sums_see_any_bit_and_keep_types() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        values = torch.randn(7, 5).to(dtype)
        before = bit_sums([values, values.t()], torch.device("cpu"))
        assert torch.equal(before[0, :1], before[1, :1])
        changed = values.clone()
        changed[3, 2] = torch.nextafter(changed[3, 2], changed[3, 2] + 1)
        assert not torch.equal(bit_sums([changed], torch.device("cpu"))[0], before[0])
        swapped = values.clone()
        swapped[0, 0], swapped[0, 1] = values[0, 1], values[0, 0]
        assert not torch.equal(bit_sums([swapped], torch.device("cpu"))[0], before[0]), "neighbours exchanged"
    assert bit_sums([torch.zeros(2), -torch.zeros(2)], torch.device("cpu")).unique(dim=0).shape[0] == 2
