"""What our layers are measured against computes the same, and is not ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parallel.world.grid import plan_grid
from parallel.world.groups import make_groups
from parallel.world.rank_env import RankEnv
from parallel.world.rng import seed_everything
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import LoraConfig
from pipeline.data.loader import Batch
from pipeline.model.layers import linear, mlp
from pipeline.model.rank_model import ModelPart
from pipeline.model.weights.load import mark_trainable
from pipeline.planning.arch import read_arch
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.rope import plan_rope
from tests.support.ranks import run_ranks
from tests.support.tiny_models import make_tiny
from tools.bench.plain import REPLACED, plain_layers


def _both(rank: int, world: int, folder: str, alone: bool = False) -> tuple[float, int, int]:
    """Worst relative difference of the gradients; tiled functions' calls with our layers, and without.

    alone: as one of twice as many ranks, under a fake process group.
    """
    world, env = (2 * world, RankEnv(rank, 2 * world, launched=True)) if alone else (world, RankEnv.read())
    groups = make_groups(plan_grid(world, world, 1, 1), env, fake=alone)
    seed_everything(0)
    arch = read_arch(Path(folder))
    model = ModelPart(arch, plan_rope(arch, RopeSettings(), 64), LoraConfig(rank=2), groups, torch.float32, "full")
    generator = torch.Generator().manual_seed(1 + rank)
    with torch.no_grad():
        for name, parameter in model.canonical_parameters():
            # Replicated ones would differ between the ranks otherwise.
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.1, generator=generator)
    mark_trainable(model, ("lora", "embed", "norm"))
    tokens = torch.randint(0, arch.vocab, (1, 64), generator=torch.Generator().manual_seed(0))
    calls = 0

    def counted(group: torch.distributed.ProcessGroup | None, *rest: object) -> object:
        nonlocal calls
        calls += 1
        return made(group, *rest)  # type: ignore[arg-type]

    made, linear.tiles_of = linear.tiles_of, counted  # type: ignore[assignment]
    mlp.tiles_of = counted  # type: ignore[assignment]

    def gradients() -> tuple[list[torch.Tensor], int]:
        nonlocal calls
        model.zero_grad()
        calls = 0
        model.train().train_step([Batch(tokens, tokens, None)], AttentionSpec("s2", 16), 1 / 64)
        return [p.grad.clone() for _, p in model.canonical_parameters() if p.grad is not None], calls

    found, tiled = gradients()
    with plain_layers():
        expected, untiled = gradients()
    again, _ = gradients()
    assert len(found) == len(expected) > 10 and all(grad.isfinite().all() for grad in expected)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "ours are back"
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)), tiled, untiled


def test_the_same_gradients_on_megatrons_own_layers(tmp_path: Path) -> None:
    for worst, tiled, untiled in run_ranks(_both, 2, str(make_tiny(tmp_path, "llama2"))):
        assert worst < 1e-5 and tiled > 4 and untiled == 0


def test_the_same_gradients_alone(tmp_path: Path) -> None:
    """What the others would send is the same for both, so neither is measured on zeros or NaN."""
    worst, tiled, untiled = _both(0, 1, str(make_tiny(tmp_path, "llama2")), alone=True)
    assert worst < 1e-5 and tiled > 4 and untiled == 0


def test_all_is_put_back() -> None:
    before = [getattr(owner, name) for owner, name, _ in REPLACED]
    with pytest.raises(KeyError), plain_layers():
        assert [getattr(owner, name) for owner, name, _ in REPLACED] != before
        raise KeyError
    assert [getattr(owner, name) for owner, name, _ in REPLACED] == before
