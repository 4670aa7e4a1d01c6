"""megatron-core's own layers, which ours are measured against: the same gradients, and none of ours among them."""

from __future__ import annotations

from pathlib import Path

import torch

from parallel.world.grid import plan_grid
from parallel.world.groups import make_groups
from parallel.world.rank_env import RankEnv
from parallel.world.rng import seed_everything
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import LoraConfig
from pipeline.data.loader import Batch
from pipeline.model.layers import linear, mlp
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import mark_trainable
from pipeline.planning.arch import read_arch
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.rope import plan_rope
from tests.support.ranks import run_ranks
from tests.support.single import single_groups
from tests.support.tiny_models import make_tiny

FAMILIES = ("local", "megatron")


def _both(rank: int, world: int, folder: str, alone: bool = False) -> tuple[float, list[int]]:
    """Worst relative difference of the gradients; of each family, calls of tiled functions.

    alone: as one of twice as many ranks, under a fake process group.
    """
    world, env = (2 * world, RankEnv(rank, 2 * world, launched=True)) if alone else (world, RankEnv.read())
    groups = make_groups(plan_grid(world, world, 1, 1), env, fake=alone)
    arch = read_arch(Path(folder))
    tokens = torch.randint(0, arch.vocab, (1, 64), generator=torch.Generator().manual_seed(0))
    calls = 0

    def counted(group: torch.distributed.ProcessGroup | None, *rest: object) -> object:
        nonlocal calls
        calls += 1
        return made(group, *rest)  # type: ignore[arg-type]

    made, linear.tiles_of = linear.tiles_of, counted  # type: ignore[assignment]
    mlp.tiles_of = counted  # type: ignore[assignment]
    gradients, tiled, names = [], [], []
    for family in FAMILIES:
        seed_everything(0)
        rope, lora = plan_rope(arch, RopeSettings(), 64), LoraConfig(rank=2, targets=("q", "v", "o", "down"))
        model = RankModel(arch, rope, lora, groups, torch.float32, "full", family=family)
        generator = torch.Generator().manual_seed(1 + rank)
        with torch.no_grad():
            for name, parameter in model.canonical_parameters():
                # Replicated ones would differ between the ranks otherwise.
                parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.1, generator=generator)
        mark_trainable(model, ("lora", "embed", "norm"))
        calls = 0
        model.train().train_step([Batch(tokens, tokens, None)], AttentionSpec("s2", 16), 1 / 64)
        gradients.append([p.grad for _, p in model.canonical_parameters() if p.grad is not None])
        tiled.append(calls)
        names.append([name for name, _ in model.canonical_parameters()])
    assert names[0] == names[1]
    found, expected = gradients
    assert len(found) == len(expected) > 10 and all(grad.isfinite().all() for grad in expected)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)), tiled


def test_the_same_gradients_on_megatrons_own_layers(tmp_path: Path) -> None:
    for worst, (ours, megatrons) in run_ranks(_both, 2, str(make_tiny(tmp_path, "llama2"))):
        assert worst < 1e-5 and ours > 4 and megatrons == 0


def test_the_same_gradients_alone(tmp_path: Path) -> None:
    """What the others would send is the same for both, so neither is measured on zeros or NaN."""
    worst, (ours, megatrons) = _both(0, 1, str(make_tiny(tmp_path, "llama2")), alone=True)
    assert worst < 1e-5 and ours > 4 and megatrons == 0


def test_only_the_norm_is_ours_in_megatrons_family(tmp_path: Path) -> None:
    """Which classes do the work, and whether they keep to the same names with adapters beside them and without."""
    arch = read_arch(make_tiny(tmp_path, "llama2"))
    made: dict[str, set[str]] = {}
    for family in FAMILIES:
        for lora in (LoraConfig(rank=0), LoraConfig(rank=2)):
            rope = plan_rope(arch, RopeSettings(), 64)
            model = RankModel(arch, rope, lora, single_groups(), torch.float32, "none", family=family)
            frozen = {name for name, _ in model.frozen_matrices()}
            assert len(frozen) == 4 * arch.layers and frozen < {name for name, _ in model.canonical_parameters()}
            made.setdefault(family, set()).update(type(module).__name__ for module in model.modules())
    assert made["local"] - made["megatron"] == {
        *("TiledColumnParallelLinear", "TiledRowParallelLinear", "LastRowParallelLinear", "TiledMLP", "SwiGlu"),
        "StreamNorm",
    }
    assert made["megatron"] - made["local"] == {"RowParallelLinear", "MLP", "EagerSwiGlu"}
