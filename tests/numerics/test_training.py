"""The trainer: data-parallel against one process, and a resumed run against an uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from parallel.errors import ConfigError
from parallel.world.grid import GridPlan
from parallel.world.groups import destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline.checkpoint.tensors import whole_trained
from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import load_config
from pipeline.planning.arch import LlamaArch
from pipeline.train import train
from tests.numerics.movement import tensor_errors
from tests.support.ranks import run_ranks
from tests.support.runs import build_run
from tests.support.tiny_models import make_tiny, write_tokenizer

MOVED = 1e-4
"""Error of an update over its size: eps is small, so that Adam magnifies gradients near zero."""
YAML = """
model: {{path: {base}, context: 64, dtype: {dtype}, rope: {{type: linear, factor: 2}}}}
attention: {{kind: s2, group_size: 16}}
lora: {{rank: 4, dropout: {dropout}}}
data: {{path: {text}, mask_documents: {mask}}}
train: {{steps: 6, global_batch: 4, micro_batch: 1, lr: 5.0e-3, warmup_steps: 2, recompute: {recompute}}}
save: {{every: 3, keep: 5}}
output: {output}
"""


def write_run(folder: Path, output: str, kind: str = "smollm2", **over: Any) -> Path:
    """A tiny model, text and configuration in `folder`; returns the YAML."""
    base, text = folder / "base", folder / "text"
    if not base.exists():
        make_tiny(base, kind)
        write_tokenizer(base)
        text.mkdir()
        words = np.random.default_rng(0).integers(0, 50, 6000)
        for part in range(3):
            chosen = words[2000 * part : 2000 * (part + 1)]
            (text / f"{part}.txt").write_text(" ".join(f"w{word % 25}{'abc'[word % 3]}" for word in chosen))
    values = {"dtype": "fp32", "dropout": 0.0, "mask": "false", "recompute": "full"} | over
    path = folder / f"{output}.yaml"
    path.write_text(YAML.format(base=base, text=text, output=folder / output, **values))
    return path


def run_here(path: Path, overrides: list[str] | None = None, stop_after: int | None = None) -> None:
    train(load_config(path, overrides or []), RankEnv(), stop_after)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def final(folder: Path) -> dict[str, torch.Tensor]:
    step = (folder / "checkpoints" / "latest").read_text().strip()
    return whole_trained(folder / "checkpoints" / step)


def starting_weights(path: Path) -> dict[str, torch.Tensor]:
    """What trains, before it does."""
    run = build_run(load_config(path, [f"output={path.with_suffix('')}-not-trained"]), RankEnv())
    try:
        return {name: tensor.clone() for name, tensor in run.trainer.parts.optimizer.masters().items()}
    finally:
        run.trainer.parts.saver.close()
        run.trainer.parts.loader.close()
        destroy_groups()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_is_bit_equal(dtype: str, tmp_path: Path) -> None:
    straight = write_run(tmp_path, "straight", dtype=dtype, dropout=0.1)
    broken = write_run(tmp_path, "broken", dtype=dtype, dropout=0.1)
    run_here(straight)
    run_here(broken, stop_after=4)
    assert len(losses(tmp_path / "broken")) == 4
    run_here(broken)
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    assert losses(tmp_path / "straight")[-1] < losses(tmp_path / "straight")[0]
    mine, theirs = final(tmp_path / "broken"), final(tmp_path / "straight")
    assert mine.keys() == theirs.keys() and len(mine) > 10
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_accumulation_micro_batches_and_recompute_change_nothing(tmp_path: Path) -> None:
    plain = write_run(tmp_path, "plain")
    other = write_run(tmp_path, "other", recompute="none")
    run_here(plain)
    run_here(other, ["train.micro_batch=4"])
    assert np.allclose(losses(tmp_path / "plain"), losses(tmp_path / "other"), rtol=1e-5)


def _train_rank(rank: int, world: int, path: str) -> list[float]:
    train(load_config(Path(path), []), RankEnv.read())
    return losses(Path(path).with_suffix("")) if rank == 0 else []


@pytest.mark.parametrize("mask", ["false", "true"])
def test_data_parallel_equals_one_process(mask: str, tmp_path: Path) -> None:
    one = write_run(tmp_path, "one", mask=mask)
    two = write_run(tmp_path, "two", mask=mask)
    run_here(one)
    found = run_ranks(_train_rank, 2, str(two), timeout=240)[0]
    assert np.allclose(found, losses(tmp_path / "one"), rtol=1e-5)
    start = starting_weights(two)
    moved = tensor_errors(final(tmp_path / "two"), final(tmp_path / "one"), start)
    print(f"\nworst update: {max(moved.values()):.1e} of its size")
    assert max(moved.values()) <= MOVED and len(moved) > 10, moved


def test_resume_under_other_mathematics_is_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path, "run")
    run_here(path, stop_after=3)
    with pytest.raises(ConfigError, match=r"attention\.group_size was 16 .* 32 now"):
        run_here(path, ["attention.group_size=32"])
    with pytest.raises(ConfigError, match=r"train\.lr was"):
        run_here(path, ["train.lr=1e-2"])
    # A user in doubt switches the invariants on when resuming; they compute nothing else.
    run_here(path, ["train.recompute=none", "train.steps=4", "checks=true"])
    assert rows(tmp_path / "run")[-1]["step"] == 4


def test_evaluating_beyond_the_context_is_told_when_training_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, "run")
    beyond = [f"eval.path={tmp_path / 'text'}", "eval.lengths=[96]", "eval.windows=1"]
    run_here(path, [*beyond, "train.steps=1", "train.warmup_steps=0"])
    told = " ".join("".join(capfd.readouterr()).split())
    assert "warning: eval.lengths: 96 exceed model.context 64" in told


def test_advice_on_the_grid_is_told_when_training_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def advise(config: RunConfig, arch: LlamaArch, plan: GridPlan) -> tuple[str, ...]:
        return (f"groups of {config.group}, {arch.heads} heads, cp {plan.cp}.",)

    monkeypatch.setattr("pipeline.planning.run_plan.advise", advise)
    run_here(write_run(tmp_path, "run"), ["train.steps=1", "train.warmup_steps=0"])
    assert "warning: groups of 16, 9 heads, cp 1." in " ".join("".join(capfd.readouterr()).split())


def test_frozen_weights_are_not_saved_and_do_not_change(tmp_path: Path) -> None:
    path = write_run(tmp_path, "run")
    before = load_file(tmp_path / "base" / "model.safetensors")
    run_here(path)
    saved = final(tmp_path / "run")
    assert not any(name.endswith("q_proj.weight") for name in saved)
    assert "model.embed_tokens.weight" in saved and "model.norm.weight" in saved
    assert not torch.equal(saved["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    after = load_file(tmp_path / "base" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
