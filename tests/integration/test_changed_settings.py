"""Settings that change between a run and its resume, where they are allowed to: what goes on, what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.errors import ConfigError
from parallel.world.groups import destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline.checkpoint.compatibility import check_resumable, check_settings
from pipeline.checkpoint.manifest import read_manifest
from pipeline.config.yaml_file import config_dict, load_config
from pipeline.data.sampler import epoch_permutation
from pipeline.train import main
from tests.numerics.test_training import losses, rows, run_here, write_run
from tests.support.runs import build_run
from tests.support.tiny_models import make_tiny


def windows_of(loader: Any, step: int) -> list[list[int]]:
    """First tokens of every window of a step: enough to tell them apart."""
    return [row[:24].tolist() for batch in loader.step(step) for row in batch.tokens]


def test_named_settings_change_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = write_run(tmp_path, "run"), tmp_path / "run"
    begun = ["--config", str(path), "--set", "train.clip=0"]
    assert main([*begun, "--stop-after", "2"]) == 0
    capsys.readouterr()
    changed = ["train.lr=1.0e-3", "train.global_batch=2", "train.schedule=cosine"]
    words = [*begun, *(word for setting in changed for word in ("--set", setting))]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "Resume: train.global_batch was 4 in the checkpoint and is 2 now" in told
    assert "set resume.allow: [train.global_batch], or choose another output folder" in told
    assert f"(a new run begins with these weights by init_from: {run})" in told
    words += ["--set", "resume.allow=[train.lr, train.global_batch, train.schedule]"]
    assert main([*words, "--stop-after", "4"]) == 0
    told = capsys.readouterr().out
    assert "warning: resume: train.lr was 0.005 and is 0.001 from step 2 on." in told
    # The new rates: half a cosine from the last warm-up step (2) to a tenth at the last step (6), by hand.
    cosine = [1e-3 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (step - 1) / 4))) for step in (2, 3)]
    assert [row["lr"] for row in rows(run)] == pytest.approx([2.5e-3, 5e-3, *cosine])
    assert [row["tokens"] for row in rows(run)] == [256, 256, 128, 128]
    # Sequences 0 to 7 were read by the first two steps, 8 to 11 by the next.
    manifest = read_manifest(run / "checkpoints/step-000004").raw
    assert manifest["cursor"] == {"step": 4, "sequences": 12}
    expected = {"train.lr": (5e-3, 1e-3), "train.global_batch": (4, 2), "train.schedule": ("constant", "cosine")}
    found = {change["setting"]: (change["old"], change["new"]) for change in manifest["changes"]}
    assert found == expected | {"train.lr_embed_norm": (5e-3, 1e-3)}
    assert {change["step"] for change in manifest["changes"]} == {2}
    assert json.loads((run / "run.json").read_text())["changes"] == manifest["changes"]
    # A later resume needs no permission any more, keeps the place and the history, and reads on.
    again = build_run(load_config(path, ["train.clip=0", *changed]), RankEnv())
    try:
        parts = again.trainer.parts
        order = epoch_permutation(parts.config.train.seed, 0, parts.loader.windows)
        dataset = parts.loader._dataset
        wanted = [dataset.window(int(index)).tokens[:24].tolist() for index in order[12:14]]
        assert windows_of(parts.loader, 4) == wanted
        assert parts.manifest["changes"] == manifest["changes"] and again.resumed is not None
    finally:
        again.trainer.parts.loader.close()
        destroy_groups()


def test_other_data_begin_at_their_beginning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, "run")
    run_here(path, stop_after=2)
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"x{n * n % 977}" for n in range(3000)))
    with pytest.raises(ConfigError, match=r"training data is not the one .*set resume\.allow: \[data\.path\]"):
        run_here(path, [f"data.path={other}"])
    capsys.readouterr()
    allowed = [f"data.path={other}", "resume.allow=[data.path]"]
    run = build_run(load_config(path, allowed), RankEnv())
    try:
        parts = run.trainer.parts
        order = epoch_permutation(parts.config.train.seed, 0, parts.loader.windows)
        wanted = [parts.loader._dataset.window(int(index)).tokens[:24].tolist() for index in order[:4]]
        assert windows_of(parts.loader, 2) == wanted, "its first windows, at the third step"
        assert run.resumed is not None
        assert run.resumed.warnings == (
            f"resume: data.path was {str(tmp_path / 'text')!r} and is {str(other)!r} from step 2 on; the training data "
            "are other ones, and are read from their beginning.",
        )
    finally:
        run.trainer.parts.loader.close()
        destroy_groups()
    run_here(path, allowed, stop_after=3)
    manifest = read_manifest(tmp_path / "run/checkpoints/step-000003").raw
    assert manifest["cursor"] == {"step": 3, "sequences": 4} and manifest["data_start"] == {"step": 2, "read": 0}
    run_here(path, [f"data.path={other}"], stop_after=4)
    assert len(losses(tmp_path / "run")) == 4


def test_each_setting_needs_its_own_name_and_some_have_none(tmp_path: Path) -> None:
    make_tiny(tmp_path / "base", "llama2")
    path = write_run(tmp_path, "run")
    saved = config_dict(load_config(path, []))

    def settings(*changes: str, allow: str = "") -> list[str]:
        now = config_dict(load_config(path, [*changes, f"resume.allow=[{allow}]"]))
        return sorted(change.setting for change in check_settings(saved, now))

    for change, name in {
        "train.lr_embed_norm=1e-4": "train.lr_embed_norm",
        "train.betas=[0.8, 0.99]": "train.betas",
        "train.warmup_steps=1": "train.warmup_steps",
        "train.seed=5": "train.seed",
        "lora.dropout=0.1": "lora.dropout",
        "attention.group_size=32": "attention.group_size",
        "data.sequence=32": "data.sequence",
        "data.mask_documents=true": "data.mask_documents",
    }.items():
        with pytest.raises(ConfigError, match=rf"^Resume: {name} was .*set resume\.allow: \[{name}\]"):
            settings(change)
        assert settings(change, allow=name) == [name]
        with pytest.raises(ConfigError, match=rf"^Resume: {name} was"):
            settings(change, allow="train.eps")
    # Full attention has no groups: their settings go with it.
    assert "attention.kind" in settings("attention={kind: full}", allow="attention.kind")
    assert settings("train.steps=9") == ["train.steps"], "free, and recorded"
    with pytest.raises(ConfigError, match=r"train\.steps was 6 .* bends a cosine .*\[train\.steps\]"):
        settings("train.steps=9", "train.schedule=cosine", allow="train.schedule")
    for change in ("lora.rank=2", "lora.alpha=2", "train.trainable=[lora]"):
        with pytest.raises(ConfigError, match="restore it, or choose another output folder"):
            settings(change, allow="train.lr")
    with pytest.raises(ConfigError, match=r"^resume\.allow: lora\.rank cannot change within a run"):
        settings(allow="lora.rank")
    # A sequence that is allowed to change makes other windows of the same text.
    both = {"base_hash": "b", "data_fingerprint": "d", "config": saved}
    now = config_dict(load_config(path, ["data.sequence=32", "resume.allow=[data.sequence]"]))
    found = check_resumable(both, both | {"data_fingerprint": "e", "config": now})
    assert [change.setting for change in found] == ["data.sequence"]
