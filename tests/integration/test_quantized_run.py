"""A run on a base in 4 bits, from its first step to its exports; an oracle computes it from the rounded weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.errors import CheckpointError, ConfigError
from parallel.world.groups import destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline.config.rope import RopeSettings
from pipeline.config.yaml_file import load_config
from pipeline.export.adapter_read import load_adapter
from pipeline.export.formats import export
from pipeline.export.trained_model import load_trained_model
from pipeline.export.verify import sample_tokens, verify
from pipeline.export.verify_logits import training_weights
from pipeline.export.verify_reference import own_logits
from pipeline.model.layers.quantized_weight import dequantized
from pipeline.model.weights.load import load_trained, mark_trainable
from pipeline.planning.attention_layout import SequenceLayout
from tests.numerics import test_run_oracle
from tests.numerics.run_cases import train_here, write_case
from tests.numerics.run_oracle import Oracle
from tests.numerics.test_model_parity import FULL, stage_of
from tests.support.runs import build_run

STREAMED = {"stream": 16, "group": "group_size: 16", "full_last": 0}


@pytest.mark.parametrize("over", [{"steps": 4}, {"steps": 3, **STREAMED}], ids=["whole", "streamed"])
def test_a_run_in_four_bits(over: dict[str, object], tmp_path: Path) -> None:
    path = write_case(tmp_path, "run", "blocks", **over)
    train_here(path, overrides=("model.base=nf4", "checks=true"))
    output, base = tmp_path / "run", tmp_path / "blocks-fp32"
    checkpoint = output / "checkpoints" / (output / "checkpoints" / "latest").read_text().strip()
    if "stream" not in over:
        _resumes_as_it_was(path)
        _exports(checkpoint, base, tmp_path)
    tensors = load_file(base / "model.safetensors")
    rounded = {name: dequantized("nf4", value) if "_proj." in name else value for name, value in tensors.items()}
    assert sum(not torch.equal(rounded[name], tensors[name]) for name in tensors) == 14
    save_file(rounded, base / "model.safetensors", metadata={"format": "pt"})
    oracle = Oracle(path)
    test_run_oracle.check(path, oracle, oracle.run())


def _resumes_as_it_was(path: Path) -> None:
    for other in ("bf16", "fp8"):
        with pytest.raises(ConfigError, match=rf"model\.base was 'nf4' in the checkpoint and is '{other}' now"):
            train_here(path, overrides=(f"model.base={other}",))
    output = path.with_suffix("")
    run = build_run(load_config(path, [f"output={output}-bf16", f"init_from={output}"]), RankEnv())
    assert run.begun is not None and "on model.base nf4 and this run has bf16" in run.begun.warnings[0]
    run.trainer.parts.saver.close()
    run.trainer.parts.loader.close()
    destroy_groups()


def _exports(checkpoint: Path, base: Path, folder: Path) -> None:
    """Merged into the stored matrices; the effect of the rounding is that of the model that trained."""
    model = load_trained_model(checkpoint)
    assert model.form == "nf4"
    tokens = sample_tokens(model.arch.vocab)
    for form in ("merged", "adapter"):
        export(model, folder / form, form)
        report = verify(model, folder / form, form)
    merged, stored = load_file(folder / "merged/model.safetensors"), load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    low, high = (model.trained[f"{name}.lora_{side}.weight"] for side in "AB")
    wanted = stored[f"{name}.weight"] + model.lora.scale * (high @ low)
    torch.testing.assert_close(merged[f"{name}.weight"], wanted, rtol=1e-6, atol=1e-7)

    stage = stage_of(base, RopeSettings(type="linear", factor=2.0), model.context, model.lora, base="nf4")
    mark_trainable(stage, ("lora", "embed", "norm", "lm_head"))
    load_trained(stage, dict(model.trained))
    trained = stage.eval().logits(tokens, SequenceLayout.dense(*tokens.shape), FULL)
    (seen,) = own_logits(model, training_weights(model), tokens, [torch.arange(tokens.shape[1])], True)
    assert (seen - trained).abs().max() <= 1e-4
    told = report["rounding"]
    assert told["base_form"] == "nf4" and 1e-3 < told["relative_rms"] < 0.5 and 0 < told["same_likeliest_token"] <= 1
    assert "Trained on the base in nf4" in told["sentence"]
    assert json.loads((folder / "merged/verify.json").read_text())["rounding"]["relative_rms"] == told["relative_rms"]

    assert load_adapter(folder / "adapter", base).form == "nf4"
    assert "`model.base: nf4`" in (folder / "adapter/README.md").read_text()
    note = folder / "adapter/longspan.json"
    note.write_text(note.read_text().replace('"nf4"', '"int3"'))
    with pytest.raises(CheckpointError, match="trained_on is 'int3'"):
        load_adapter(folder / "adapter", base)
