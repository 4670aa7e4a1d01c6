"""The RoPE options of merge_lora and export_hf: what their errors advise is accepted and gives the right angles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from pipeline.config.rope import RopeSettings
from pipeline.export.formats import export
from tests.integration.test_import_export import trained_model, write_checkpoint
from tests.support.tiny_models import make_tiny
from tools.export_hf import main as export_main
from tools.merge_lora import main as merge_main
from tools.support.sources import in_options

LINEAR = {"type": "linear", "factor": 4.0}


def strange_adapter(folder: Path, base: Path) -> Path:
    """A PEFT adapter of others: nothing beside it tells how it was trained."""
    export(trained_model(base, rope=RopeSettings(type="none")), folder, "adapter")
    for name in ("longspan.json", "config.json"):
        (folder / name).unlink()
    return folder


def ratio(folder: Path, base: Path) -> float:
    """How many times slower transformers turns the slowest pair of `folder`'s model than plain RoPE of `base`."""
    found, theta = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq, 1e4
    return theta ** (-(2 * len(found) - 2) / (2 * len(found))) / found[-1].item()


def test_options_that_errors_name_are_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = make_tiny(tmp_path / "plain", "llama2", max_position_embeddings=4096)
    silent = make_tiny(tmp_path / "silent", "llama2", max_position_embeddings=16384, rope_scaling=LINEAR)
    llama3 = make_tiny(tmp_path / "llama3", "llama3")
    adapters = {base: strange_adapter(tmp_path / f"adapter-{base.name}", base) for base in (plain, silent, llama3)}

    def merge(base: Path, *more: str) -> tuple[int, str]:
        args = ["--adapter", str(adapters[base]), "--base", str(base), "--output", str(tmp_path / "out"), "--force"]
        code = merge_main([*args, "--no-verify", *more])
        said = capsys.readouterr()
        return code, said.err

    # Both readings of a base that does not tell its original context, as the error offers them.
    code, said = merge(silent, "--context", "65536")
    assert code == 2 and "error: --original-context: the checkpoint is already scaled linearly by 4" in said
    assert "set --original-context to 16384 if before, or to 4096 if after" in said
    assert merge(silent, "--context", "65536", "--original-context", "4096")[0] == 0
    assert ratio(tmp_path / "out", silent) == pytest.approx(16.0, rel=1e-5)
    assert merge(silent, "--context", "65536", "--original-context", "16384")[0] == 0
    assert ratio(tmp_path / "out", silent) == pytest.approx(4.0, rel=1e-5)
    # LongLoRA's whole factor, from what the base declares or from what is told.
    for more, factor in (((), 3.0), (("--original-context", "2048"), 5.0), (("--factor", "2.5"), 2.5)):
        assert merge(plain, "--context", "10000", *more)[0] == 0
        assert ratio(tmp_path / "out", plain) == pytest.approx(factor, rel=1e-5)
    code, said = merge(plain, "--context", "10000", "--rope", "linear", "--factor", "2")
    assert code == 2 and "--factor: 2 times the original context 4096 is 8192, less than --context 10000" in said
    code, said = merge(plain, "--context", "10000", "--rope", "abf")
    assert code == 2 and "error: --theta: --rope abf needs" in said.replace("type abf", "--rope abf")
    assert merge(plain, "--context", "10000", "--rope", "abf", "--theta", "1e6")[0] == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_theta"] == 1e6
    # Scaling of the base's own is replaced only with a word.
    code, said = merge(llama3, "--context", "256")
    assert code == 2 and "--rope: the checkpoint uses llama3 scaling up to 128" in said
    code, said = merge(llama3, "--context", "256", "--rope", "linear", "--original-context", "32")
    assert code == 0 and "warning: --rope: the checkpoint's own llama3 scaling (factor 4 of 32)" in said
    assert "model." not in said and "replaced by linear, factor 8" in said
    assert "warning" not in merge(llama3)[1]


def test_a_checkpoint_takes_what_it_leaves_open_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def checkpoint(base: Path, name: str, rope: dict[str, Any], context: int) -> list[str]:
        folder = write_checkpoint(trained_model(base, rope=RopeSettings(type="none")), tmp_path / name)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["config"]["model"] |= {"context": context, "rope": rope}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        args = ["--checkpoint", str(folder), "--output", str(tmp_path / "out"), "--force", "--format", "merged"]
        return [*args, "--no-verify"]

    plain = make_tiny(tmp_path / "plain", "llama2", max_position_embeddings=4096)
    args = checkpoint(plain, "one", {"type": "linear"}, 8192)
    assert export_main([*args, "--original-context", "2048"]) == 2
    assert "--original-context: 2048 is not the 4096 of training" in capsys.readouterr().err
    assert export_main([*args, "--factor", "2"]) == 2
    assert "--factor: a checkpoint tells this" in capsys.readouterr().err
    assert export_main([*args, "--original-context", "4096"]) == 0
    assert ratio(tmp_path / "out", plain) == pytest.approx(2.0, rel=1e-5)
    silent = make_tiny(tmp_path / "silent", "llama2", max_position_embeddings=16384, rope_scaling=LINEAR)
    args = checkpoint(silent, "two", {"type": "auto"}, 65536)
    assert export_main(args) == 2
    assert "error: --original-context: the checkpoint is already scaled" in capsys.readouterr().err
    assert export_main([*args, "--original-context", "4096"]) == 0
    assert ratio(tmp_path / "out", silent) == pytest.approx(16.0, rel=1e-5)


@pytest.mark.parametrize("command", [merge_main, export_main])
def test_every_option_an_error_may_name_exists(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(["--help"])
    options = set(capsys.readouterr().out.replace(",", " ").split())
    for setting in ("context", "path", "rope.type", "rope.factor", "rope.theta", "rope.original_context"):
        assert in_options(f"model.{setting}") in options
    for option in ("--base", "--force", "--run", "--checkpoint", "--adapter"):
        assert option in options
