"""Family te on a stand-in of plain torch: whole runs against the oracle, gradients against ours, alone and on ranks.

What real kernels make of it is measured by test_te_gpu.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from parallel.errors import ConfigError
from parallel.world.rank_env import RankEnv
from pipeline.config.yaml_file import load_config
from pipeline.evaluation.entry import evaluate_state
from pipeline.export.formats import export
from pipeline.export.trained_model import load_trained_model
from pipeline.export.verify import verify
from pipeline.model.rank_model import RankModel
from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout
from pipeline.train import train
from tests.numerics import test_run_oracle
from tests.numerics.movement import tensor_errors
from tests.numerics.run_cases import train_here, train_named, write_case
from tests.numerics.run_oracle import Oracle
from tests.numerics.test_model_parity import FULL, stage_of
from tests.numerics.test_streaming import make, step, text
from tests.support import te_standin
from tests.support.ranks import run_ranks
from tests.support.te_standin import standing_in
from tests.support.tiny_models import make_tiny

TE = "model.family=te"
SPEC = AttentionSpec("s2", 16)
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def te() -> Iterator[None]:
    with standing_in():
        yield


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RankModel]:
    return make(tmp_path_factory.mktemp("wide"), "llama3", torch.float32, **WIDE)


@pytest.mark.parametrize("model", ["llama", "qwen3", "biased"])
def test_a_run_is_the_outside_one(model: str, tmp_path: Path, te: None) -> None:
    """Losses, norms, evaluations and every trained tensor, norms that lie inside linears among them."""
    path = write_case(tmp_path, "run", model, recompute="pointwise")
    train_here(path, overrides=(TE, "checks=true"))
    oracle = Oracle(path)
    test_run_oracle.check(path, oracle, oracle.run())


def test_checkpoints_and_exports_are_those_of_any_family(tmp_path: Path) -> None:
    """Begun on our layers, gone on with on Transformer Engine's, ended on ours; exported without it."""
    path = write_case(tmp_path, "run")
    train(load_config(path), RankEnv(), stop_after=1)
    with standing_in():
        train(load_config(path, [TE]), RankEnv(), stop_after=3)
    train_here(path)
    oracle = Oracle(path)
    test_run_oracle.check(path, oracle, oracle.run())
    checkpoints = tmp_path / "run" / "checkpoints"
    model = load_trained_model(checkpoints / (checkpoints / "latest").read_text().strip())
    norms = [name for name in model.trained if name.endswith("norm.weight")]
    assert len(norms) == 2 * model.arch.layers + 1
    for form in ("merged", "adapter"):
        export(model, tmp_path / form, form)
        verify(model, tmp_path / form, form)


@pytest.mark.parametrize("kind", ["qwen2", "smollm2"])
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path, te: None) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path, kind), dtype=torch.float32).eval()
    stage = stage_of(tmp_path, family="te")
    tokens = torch.randint(0, stage.arch.vocab, (2, 37), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert (stage.logits(tokens, SequenceLayout.dense(2, 37), FULL) - expected).abs().max() <= 1e-4
    assert expected.abs().max() > 1e-2, "a model of zeros would pass"


@pytest.mark.parametrize("recompute", ["full", "gate_up", "pointwise", "none"])
def test_gradients_are_ours_and_frozen_matrices_have_none(
    recompute: str, build: Callable[..., RankModel], te: None
) -> None:
    loss, expected = step(build(), text(2, 61), SPEC)
    model = build(recompute, family="te")
    found_loss, found = step(model, text(2, 61), SPEC)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert max(tensor_errors(found, expected, None).values()) < 1e-5
    assert {name for name, _ in model.frozen_matrices()} == {name for name, _ in build().frozen_matrices()}
    assert not any(matrix.members()["weight"].requires_grad for _, matrix in model.frozen_matrices())
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "RMSNorm"} <= kinds
    assert not any("Tiled" in kind and kind != "TiledMLP" for kind in kinds) and "StreamNorm" not in kinds


def test_fp8_is_for_training_alone_and_recomputed_as_it_was(build: Callable[..., RankModel], te: None) -> None:
    batch, plain = text(1, 64), step(build(family="te"), text(1, 64), SPEC)
    made = {}
    for recompute in ("none", "full", "gate_up", "pointwise"):
        model = build(recompute, family="te", recipe="tensorwise")
        te_standin.products.clear()
        made[recompute] = step(model, batch, SPEC)
        assert len(te_standin.products) >= 4 * model.arch.layers and all(te_standin.products)
        te_standin.products.clear()
        # Lengths that FP8 refuses are evaluated.
        model.eval().token_nll(batch.tokens[:, :37], AttentionSpec("full", 2))
        assert te_standin.products and not any(te_standin.products)
    for recompute, (loss, found) in made.items():
        assert loss == made["none"][0]
        # A sum in another order falls the other way here and there; a pass in fp32 would be a hundredth away.
        assert max(tensor_errors(found, made["none"][1], None).values()) < 1e-3, recompute
    errors = tensor_errors(made["none"][1], plain[1], None)
    assert 0 < abs(made["none"][0] / plain[0] - 1) < 0.02 and 1e-3 < min(errors.values()) and max(errors.values()) < 0.5


def test_what_was_trained_in_fp8_is_evaluated_without_transformer_engine(tmp_path: Path) -> None:
    path = write_case(tmp_path, "run", steps=1, full_last=0, sequence=64)
    trained = ["model.dtype=auto", TE, "model.fp8_recipe=tensorwise"]
    with standing_in():
        train_here(path, overrides=(*trained, "eval.lengths=[64]"))
    with pytest.raises(ConfigError, match="set model.family: local and model.fp8_recipe: none") as refused:
        evaluate_state(load_config(path, trained), RankEnv(), "trained")
    assert "model.family: te needs Transformer Engine" in str(refused.value)
    (report,) = (tmp_path / "run").rglob("eval-after.json")
    there = report.read_text()
    report.unlink()
    evaluate_state(load_config(path, ["model.dtype=auto", "eval.lengths=[64]"]), RankEnv(), "trained")
    theirs, ours = (json.loads(text)["lengths"][0]["perplexity"] for text in (there, report.read_text()))
    assert ours == pytest.approx(theirs, rel=1e-5)


def _train_all(rank: int, world: int, paths: list[str]) -> None:
    with standing_in():
        for path in map(Path, paths):
            train_named(path, RankEnv.read(), (TE,))


def test_grids(tmp_path: Path) -> None:
    """Tensor and sequence parallelism inside Transformer Engine's linears, context shards, stages."""
    paths = [write_case(tmp_path, axis, steps=2, full_last=1, **{axis: 2}) for axis in ("tp", "cp", "pp")]
    run_ranks(_train_all, 2, [str(path) for path in paths], timeout=280)
    oracle = Oracle(paths[0])
    expected = oracle.run()
    for path in paths:
        test_run_oracle.check(path, oracle, expected)
