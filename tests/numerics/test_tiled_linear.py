"""Products tile by tile, and the one a recomputation skips: right gradients, nothing wide kept, and it is skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from parallel.axes.tensor import TokenTiles
from parallel.world.grid import plan_grid
from parallel.world.groups import Groups, make_groups
from parallel.world.rank_env import RankEnv
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import LoraConfig
from pipeline.data.loader import Batch
from pipeline.model.layers import residual
from pipeline.model.layers.frozen_weight import DenseWeight
from pipeline.model.layers.linear import LastRowParallelLinear, _Column, _Row
from pipeline.model.layers.lora import AdaptedLinear
from pipeline.model.layers.mlp import TiledMLP
from pipeline.model.layers.recipe import recipe_of
from pipeline.model.layers.recomputation import recomputing
from pipeline.model.layers.residual import last_residual_add, residual_add
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import mark_trainable
from pipeline.planning import tile_size
from pipeline.planning.arch import read_arch
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.rope import plan_rope
from tests.support.ranks import run_ranks
from tests.support.tiny_models import make_tiny


@pytest.fixture
def groups() -> Iterator[Groups]:
    found = make_groups(plan_grid(1, 1, 1, 1), RankEnv())
    # Uninitialized memory is filled with NaN in this mode: what comes out shows whether it was computed.
    torch.use_deterministic_algorithms(True)
    yield found
    torch.use_deterministic_algorithms(False)


def _layer(
    x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, seen: list[bool], group: dist.ProcessGroup | None
) -> torch.Tensor:
    hidden = torch.tanh(x * gain)
    seen.append(recomputing())
    if group is not None and recomputing():
        output = _Row.apply(hidden, _dense(weight), group, True)
        assert bool(output.isnan().all())
        return x + output
    return x + torch.nn.functional.linear(hidden, weight)


def _dense(weight: torch.Tensor) -> DenseWeight:
    return DenseWeight(torch.nn.Parameter(weight, requires_grad=False))


def _gradients(group: dist.ProcessGroup | None) -> tuple[list[torch.Tensor], list[bool]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1, 8, generator=generator, requires_grad=True)
    gains = [torch.randn(8, generator=generator).requires_grad_() for _ in range(2)]
    weights = [torch.randn(8, 8, generator=generator) for _ in range(2)]
    seen: list[bool] = []
    hidden = x
    for gain, weight in zip(gains, weights, strict=True):
        hidden = checkpoint(_layer, hidden, gain, weight, seen, group, use_reentrant=True)
    hidden.square().sum().backward()
    return [tensor.grad for tensor in (x, *gains) if tensor.grad is not None], seen


def test_gradients_equal_to_the_bit_whatever_the_skipped_values(groups: Groups) -> None:
    found, seen = _gradients(groups.collection.tp)
    expected, _ = _gradients(None)
    assert seen == [False, False, True, True]
    assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(bool(a.isfinite().all()) and bool(a.any()) for a in found)


def _model(folder: Path, groups: Groups, targets: tuple[str, ...], recompute: str = "full") -> RankModel:
    arch = read_arch(make_tiny(folder, "llama2"))
    rope = plan_rope(arch, RopeSettings(), 64)
    model = RankModel(arch, rope, LoraConfig(rank=2, targets=targets), groups, torch.float32, recompute)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapter"])
def test_the_layers_down_projection_is_the_one_that_skips(tmp_path: Path, groups: Groups, adapted: bool) -> None:
    """Computed in a forward pass; in a forward inside a backward its values are never made, and gradients are right."""
    model = _model(tmp_path, groups, ("q", "down") if adapted else ("q",))
    down = model.stages[0].decoder.layers[0].mlp.linear_fc2
    assert isinstance(down, AdaptedLinear) is adapted
    linear = down.base if adapted else down
    assert isinstance(linear, LastRowParallelLinear)
    linear.weight.requires_grad_(False)
    x = torch.randn(3, 1, model.arch.ffn, requires_grad=True)
    expected = down(x)[0]
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    seen: list[torch.Tensor] = []

    def layer(values: torch.Tensor) -> torch.Tensor:
        seen.append(down(values)[0])
        return seen[-1]

    checkpoint(layer, x, use_reentrant=True).sum().backward()
    first, again = seen
    assert torch.equal(first, expected) and bool(again.isnan().all())
    assert x.grad is not None and torch.allclose(x.grad, wanted, rtol=1e-6)


def test_an_adapters_update_goes_over_the_frozen_product_of_one_rank(tmp_path: Path, groups: Groups) -> None:
    """megatron's own linear returns a view there, over which autograd lets nothing be written."""
    projection = _model(tmp_path, groups, ("o",)).stages[0].decoder.layers[0].self_attention.linear_proj
    x = torch.randn(3, 1, projection.base.input_size)
    for frozen in (True, False):
        projection.base.weight.requires_grad_(not frozen)
        made_by = projection(x)[0].grad_fn
        assert ("Joint" in str(made_by)) is frozen
        projection.joint = False
        assert ("AddUpdate" in str(projection(x)[0].grad_fn)) is frozen
        projection.joint = True


def _mlp_run(mlp: torch.nn.Module, x: torch.Tensor, slope: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Through megatron's call, in a checkpoint: [values of the forward, of the recomputation], gradient of x."""
    seen: list[torch.Tensor] = []

    def layer(values: torch.Tensor) -> torch.Tensor:
        seen.append(mlp(values, padding_mask=None)[0])
        return seen[-1]

    x = x.clone().requires_grad_()
    checkpoint(layer, x, use_reentrant=True).backward(slope)
    assert x.grad is not None
    return seen, x.grad


def test_frozen_mlp_in_tiles_equals_the_whole_one(
    tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(tmp_path, groups, ("q",))
    mlp = model.stages[0].decoder.layers[0].mlp
    assert isinstance(mlp, TiledMLP)
    x, slope = torch.randn(2, 7, 2, model.arch.hidden).unbind()
    whole, expected = _mlp_run(mlp, x, slope)  # trains: not tiled
    assert torch.equal(whole[0], whole[1])
    mlp.requires_grad_(False)
    monkeypatch.setattr(tile_size, "LEAST_TOKENS", 6)  # of both sequences
    monkeypatch.setattr(tile_size, "TILE_ELEMENTS", 1)
    widest = 0

    product = DenseWeight.product

    def watched(self: DenseWeight, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal widest
        widest = max(widest, rows.shape[0])
        return product(self, rows, out)

    monkeypatch.setattr(DenseWeight, "product", watched)
    tiled, found = _mlp_run(mlp, x, slope)
    assert widest == 3  # of 7: three tiles
    assert (tiled[0] - whole[0]).norm() <= 1e-6 * whole[0].norm() and bool(tiled[1].isnan().all())
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    kept = _kept_by(lambda: mlp(x.clone().requires_grad_()))
    assert kept == [x.shape]


def _kept_by(work: Callable[[], Any]) -> list[torch.Size]:
    """Shapes of what the backward keeps."""
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        work()
    return kept


def test_frozen_mlp_has_a_norm_make_its_input_again(
    tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients with and without the recipe are equal to the bit, the norm's weight's too; its output is not kept."""
    layer = _model(tmp_path, groups, ("q",)).stages[0].decoder.layers[0]
    norm, mlp = layer.pre_mlp_layernorm, layer.mlp.requires_grad_(False)
    monkeypatch.setattr(tile_size, "LEAST_TOKENS", 3)
    monkeypatch.setattr(tile_size, "TILE_ELEMENTS", 1)
    x, slope = torch.randn(2, 7, 2, mlp.linear_fc1.input_size).unbind()

    def gradients(forget: bool) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        normed = norm(leaf)[0]
        output = mlp(normed * 1 if forget else normed)[0]
        return list(torch.autograd.grad(output, (leaf, norm.weight), slope))

    assert recipe_of(norm(x)[0]) is not None and recipe_of(norm(x)[0] * 1) is None
    for found, expected in zip(gradients(False), gradients(True), strict=True):
        assert bool(expected.any()) and torch.equal(found, expected)
    normed = norm(x.clone().requires_grad_())[0]
    storages: set[int] = set()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (storages.add(t.data_ptr()), t)[1], lambda t: t)
    with hooks:
        mlp(normed)
    assert normed.data_ptr() not in storages and len(storages) == 2  # the norm's input and weight


def test_without_recompute_gate_and_up_are_kept_not_computed_twice(tmp_path: Path, groups: Groups) -> None:
    mlp = _model(tmp_path, groups, ("q",), recompute="none").stages[0].decoder.layers[0].mlp.requires_grad_(False)
    kept = _kept_by(lambda: mlp(torch.randn(5, 1, mlp.linear_fc1.input_size, requires_grad=True)))
    assert torch.Size((5, 1, mlp.linear_fc1.weight.shape[0])) in kept


def test_the_sum_that_leaves_a_layer_is_made_once(groups: Groups) -> None:
    """Its gradient goes both ways, and whatever its recomputed values are does not matter."""
    x, residual = (torch.randn(3, 1, 4, requires_grad=True) for _ in range(2))
    seen: list[torch.Tensor] = []

    def layer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        attended = residual_add(True, False)((right * 1, None), left, 0)
        seen.append(last_residual_add(True, False)((left * 2, None), attended, 0))
        return seen[-1]

    slope = torch.randn(3, 1, 4)
    checkpoint(layer, x, residual, use_reentrant=True).backward(slope)
    assert torch.equal(seen[0], x * 2 + (x + residual)) and bool(seen[1].isnan().all())
    assert x.grad is not None and torch.equal(x.grad, slope * 2 + slope)
    assert residual.grad is not None and torch.equal(residual.grad, slope)


@pytest.mark.parametrize("recompute", ["full", "none"])
def test_a_layers_sums_are_made_in_place_only_where_nothing_keeps_them(
    tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    """Through megatron's layer, which enables gradients around both: a checkpointed layer's first pass, evaluation."""
    seen: list[tuple[bool, bool]] = []
    add = residual._add

    def spied(x_and_bias: Any, stream: torch.Tensor, dropout: float) -> torch.Tensor:
        result = add(x_and_bias, stream, dropout)
        seen.append((recomputing(), result.data_ptr() == x_and_bias[0].data_ptr()))
        return result

    monkeypatch.setattr(residual, "_add", spied)
    model = _model(tmp_path, groups, ("q", "o"), recompute).train()
    mark_trainable(model, ("lora", "norm"))
    tokens = torch.randint(0, model.arch.vocab, (1, 32))
    spec = AttentionSpec("s2", 16)
    model.train_step([Batch(tokens, tokens, None)], spec, 1.0)
    first, trained = model.arch.layers, len(seen)
    if recompute == "full":
        # Both sums of every layer in place; recomputed, attention's is kept and the last is not made.
        assert seen == [(False, True)] * 2 * first + [(True, False)] * first
    else:
        assert seen == [(False, False)] * 2 * first
    model.token_nll(tokens, spec)
    assert seen[trained:] == [(False, True)] * 2 * first


def test_one_rank_alone(groups: Groups) -> None:
    """Both linears in tiles where nothing is sent; memory that nobody wrote would be NaN."""
    group = groups.collection.tp
    x, weight = torch.randn(6, 2, 8, requires_grad=True), torch.randn(4, 8)
    grad = torch.randn(6, 2, 4)
    expected = torch.nn.functional.linear(x, weight)
    (slope,) = torch.autograd.grad(expected, x, grad)
    for found in (_Column.apply(x, _dense(weight), None, group), _Row.apply(x, _dense(weight), group, False)):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, x, grad)[0], slope)


def _tiles(rank: int, world: int) -> bool:
    """Seven tokens a rank in tiles of three: gathered, read, written and summed as if whole."""
    groups = make_groups(plan_grid(world, world, 1, 1), RankEnv.read())
    tiles = TokenTiles(groups.collection.tp, 7, 3 * world)
    assert tiles.spans == [(0, 3), (3, 6), (6, 7)]
    everything = torch.arange(7 * world * 2, dtype=torch.float32).view(7 * world, 2)
    mine = everything[7 * rank : 7 * rank + 7]
    copied, total = torch.full_like(everything, torch.nan), torch.full_like(mine, torch.nan)
    scatter = tiles.scatter(total)
    for span, whole in zip(tiles.spans, tiles.gather(mine), strict=True):
        assert torch.equal(whole, tiles.read(everything, span))
        tiles.write(copied, span, whole)
        assert scatter.target(span) is None
        scatter.put(span, whole * (rank + 1))
    scatter.finish()
    assert torch.equal(copied, everything)
    assert torch.equal(total, mine * sum(range(1, world + 1)))
    return True


def test_tiles_between_ranks() -> None:
    assert run_ranks(_tiles, 2) == [True, True]


@pytest.mark.parametrize(
    ("ranks", "tokens", "most", "sizes"),
    [
        (1, 32768, 3300, {3328, 32768 - 9 * 3328}),  # 10 tiles, and no 10 to 13 alike ones of whole blocks
        (1, 32768, 3000, {3072, 32768 - 10 * 3072}),
        (1, 32768, 5000, {4096}),  # 7 tiles would do; 8 are alike
        (1, 32768, 2500, {2048}),
        (1, 1000, 300, {250}),  # few tokens are not rounded
        (1, 32768, 40000, {32768}),
        (1, 12345, 4000, {3200, 12345 - 3 * 3200}),
        (8, 4096, 9362, {1024}),
        (8, 12500, 9000, {1152, 12500 - 10 * 1152}),  # whole blocks of each rank's tokens
        (8, 900, 1600, {192, 900 - 4 * 192}),  # few tokens: whole blocks of all ranks' together
    ],
)
def test_tiles_are_whole_blocks_of_rows(ranks: int, tokens: int, most: int, sizes: set[int]) -> None:
    group = None
    if ranks > 1:
        group = make_groups(plan_grid(ranks, ranks, 1, 1), RankEnv(0, ranks, launched=True), fake=True).collection.tp
    spans = TokenTiles(group, tokens, most).spans
    assert [start for start, _ in spans[1:]] == [stop for _, stop in spans[:-1]]
    assert spans[0][0] == 0 and spans[-1][1] == tokens
    assert {stop - start for start, stop in spans} == sizes
