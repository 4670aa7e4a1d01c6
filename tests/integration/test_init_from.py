"""A new run that begins with trained weights: a run's, a checkpoint's or an adapter's; on any grid and both engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.errors import CheckpointError, ConfigError
from parallel.world.groups import destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.tensors import whole_trained
from pipeline.config.yaml_file import load_config
from pipeline.evaluation.perplexity import EvalReport
from pipeline.export.formats import export
from pipeline.export.trained_model import load_trained_model
from pipeline.train import main, train
from pipeline.training.run_record import Run
from tests.numerics.test_training import write_run
from tests.support.ranks import run_ranks
from tests.support.runs import build_run

KIND = "tinyllama"
GRIDS = (
    ["parallel={tp: 2, cp: 2}"],
    ["parallel={pp: 2}"],
    ["parallel={engine: zero3, tp: 2, offload: {params: cpu, optimizer: cpu}}"],
)
"""Of four ranks; the second is dp 2, so that its optimizer is sharded."""


def trained(folder: Path) -> Path:
    """A run of three steps, evaluated; its YAML makes further runs of the same base and text."""
    path, text = write_run(folder, "source", kind=KIND), folder / "held-out.txt"
    text.write_text(" ".join(f"v{n * n % 997}" for n in range(900)))
    sets = ["--set", "train.steps=3", "--set", f"eval.path={text}", "--set", "eval.windows=2"]
    assert main(["--config", str(path), *sets]) == 0
    return path


def begun(path: Path, source: Path, output: Path, *more: str) -> Run:
    return build_run(load_config(path, [f"output={output}", f"init_from={source}", *more]), RankEnv.read())


def ended(run: Run) -> None:
    run.trainer.parts.saver.close()
    run.trainer.parts.loader.close()
    run.trainer.parts.model.close()
    destroy_groups(keep_world=run.groups.env.launched)


def save_at_once(path: Path, source: Path, output: Path, *more: str) -> dict[str, Any]:
    """Save the state the run begins with; what there is of it."""
    run = begun(path, source, output, *more)
    try:
        run.trainer.save()
        moments = [float(moment.abs().max()) for _, moment in run.trainer.parts.optimizer.own_moments()]
        loss = run.trainer.gradients(0)["loss"]
        return {"moments": max(moments), "updates": run.trainer.parts.optimizer.updates, "loss": loss}
    finally:
        ended(run)


def exported(checkpoint: Path, output: Path) -> dict[str, bytes]:
    export(load_trained_model(checkpoint), output, "merged")
    return {file.name: file.read_bytes() for file in output.glob("*.safetensors")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def on_grids(rank: int, world: int, path: str, source: str, folder: str) -> list[dict[str, Any]]:
    return [
        save_at_once(Path(path), Path(source), Path(folder) / f"grid-{number}", *grid)
        for number, grid in enumerate(GRIDS)
    ]


def _resumed(path: str, folder: Path) -> int:
    """A run saved on the third grid goes on in one process, though its source is gone and init_from still names it."""
    config = load_config(Path(path), [f"output={folder / 'grid-2'}", "init_from=gone", "train.steps=1"])
    return train(config, RankEnv())


def test_from_a_run_a_checkpoint_and_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, source = trained(tmp_path), tmp_path / "source"
    checkpoint = source / "checkpoints/step-000003"
    masters, bytes_of = whole_trained(checkpoint), exported(checkpoint, tmp_path / "merged")

    # From the run, by the command: the evaluation before its first step is the source's last, to the bit.
    sets = ["--set", "train.steps=1", "--set", f"eval.path={tmp_path / 'held-out.txt'}", "--set", "eval.windows=2"]
    words = ["--config", str(path), *sets, "--set", f"output={tmp_path / 'next'}", "--set", f"init_from={source}"]
    assert main([*words, "--set", "checks=true"]) == 0
    told = capsys.readouterr().out
    assert f"begins with the weights of {checkpoint} (step 3)" in told
    after, start = (EvalReport.read(tmp_path / name) for name in ("source/eval-after.json", "next/eval-initial.json"))
    assert start.perplexity == after.perplexity and (start.step, after.step) == (0, 3)
    manifest = read_manifest(tmp_path / "next/checkpoints/step-000001")
    assert manifest.updates == 1 and manifest.raw["init_from"] == {"path": str(checkpoint), "step": 3}
    assert json.loads((tmp_path / "next/run.json").read_text())["init_from"]["step"] == 3

    # From a checkpoint: fresh moments, and the export of what was saved straight away is the source's.
    alone = save_at_once(path, checkpoint, tmp_path / "again")
    assert (alone["moments"], alone["updates"]) == (0.0, 0)
    first = tmp_path / "again/checkpoints/step-000000"
    assert same(whole_trained(first), masters) and exported(first, tmp_path / "merged-again") == bytes_of

    # From the adapter that was exported of it.
    export(load_trained_model(checkpoint), tmp_path / "adapter", "adapter")
    shutil.rmtree(tmp_path / "next")
    save_at_once(path, tmp_path / "adapter", tmp_path / "next")
    first = tmp_path / "next/checkpoints/step-000000"
    assert same(whole_trained(first), masters) and exported(first, tmp_path / "merged-adapter") == bytes_of

    refusals(path, tmp_path)


@pytest.mark.slow
def test_on_other_grids_and_the_other_engine(tmp_path: Path) -> None:
    """All in one launch; each saves at once what it began with, and the last goes on in one process."""
    path, source = trained(tmp_path), tmp_path / "source"
    checkpoint = source / "checkpoints/step-000003"
    masters = whole_trained(checkpoint)
    alone = save_at_once(path, source, tmp_path / "alone")
    for found in run_ranks(on_grids, 4, str(path), str(source), str(tmp_path), timeout=240):
        for row in found:
            assert (row["moments"], row["updates"]) == (0.0, 0)
            assert row["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    for number in range(len(GRIDS)):
        assert same(whole_trained(tmp_path / f"grid-{number}/checkpoints/step-000000"), masters), GRIDS[number]
    shutil.rmtree(source)
    assert _resumed(str(path), tmp_path) == 0
    assert read_manifest(tmp_path / "grid-2/checkpoints/step-000001").raw["init_from"]["path"] == str(checkpoint)


def refusals(path: Path, folder: Path) -> None:
    """Everything that does not fit is one sentence, and leaves no groups behind."""
    source = folder / "again"

    def refused(kind: type[Exception], *settings: str, at: Path = source) -> str:
        with pytest.raises(kind) as told:
            begun(path, at, folder / "refused", *settings)
        destroy_groups()
        assert "\n" not in str(told.value) and not (folder / "refused/checkpoints").exists()
        return str(told.value)

    assert f"init_from: {folder / 'none'} does not exist" in refused(ConfigError, at=folder / "none")
    assert "is not a run's output, a checkpoint or an adapter" in refused(ConfigError, at=folder / "text")
    assert "adapters of rank 4 and this run of rank 2; set lora.rank: 4" in refused(ConfigError, "lora.rank=2")
    assert "scales its adapters by 4 and this run by 8; set lora.alpha: 16" in refused(ConfigError, "lora.alpha=32")
    told = refused(ConfigError, "train.trainable=[lora, norm]")
    assert "trained model.embed_tokens.weight, which this run would drop; add its kind to train.trainable" in told
    assert "k_proj" in refused(ConfigError, "lora.targets=[q, v, o]")
    assert "vocabulary rows and this run" in refused(ConfigError, "model.vocab=140")
    run = begun(path, source, folder / "longer", "model.context=128", "data.sequence=64", "model.rope.factor=4")
    assert run.begun is not None and "was trained with RoPE linear x 2 (context 64)" in run.begun.warnings[0]
    ended(run)
    (file,) = (source / "checkpoints/step-000000").glob("trained-00000.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    assert "none of its 1 checkpoints is whole" in refused(CheckpointError)
    base = folder / "base/model.safetensors"
    raw = bytearray(base.read_bytes())
    raw[-3] ^= 1
    base.write_bytes(bytes(raw))
    assert "was trained on another base than model.path" in refused(ConfigError, at=folder / "source")
    assert "was trained on another base than model.path" in refused(ConfigError, at=folder / "adapter")
