"""Each thing that may be missing gives its own sentence, on facts handed in; what is there gives none."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.checkpoint.manifest import checksum_text, manifest_bytes
from pipeline.config.rope import RopeSettings
from pipeline.config.run import RunConfig
from pipeline.config.sections import ModelConfig
from pipeline.config.yaml_file import config_dict, load_config
from pipeline.data.shards import read_manifest
from pipeline.planner.auto import Device
from pipeline.planning.arch import read_arch
from pipeline.planning.memory import GIB, MemoryEstimate
from pipeline.planning.run_plan import RunPlan, plan_model
from pipeline.preflight import files, survey
from pipeline.preflight.survey import Gpu, Launch, Machine, Space
from tests.support.tiny_models import make_tiny, write_tokenizer
from tools.preflight import main, show, weights_bytes

ROOT = Path(__file__).parents[3]
A100 = Gpu("NVIDIA A100-SXM4-80GB", 80 * GIB, 79 * GIB, 8.0)
NODE = Machine((A100,) * 8, 500 * GIB, "this machine", 8 * GIB)
ESTIMATE = MemoryEstimate(
    gpu={"layer inputs": 20 * GIB, "optimizer": GIB},
    host={"process": 4 * GIB, "frozen weights, shard": 16 * GIB},
    host_once=3 * GIB,
    checkpoint=3 * GIB,
)
MIB = 2**20


def test_gpus_one_a_process() -> None:
    assert not survey.check_gpus(NODE.gpus, 8).problem
    assert "PyTorch sees none, and 8 are needed" in survey.check_gpus((), 8).problem
    assert "longspan train --device cpu" in survey.check_gpus((), 8).problem
    few = survey.check_gpus(NODE.gpus[:4], 8)
    assert "8 processes need one each and 4 are visible; pass --nproc 4" in few.problem
    assert few.found == "4 (NVIDIA A100-SXM4-80GB)"


def test_gpu_memory_too_small_names_the_largest_part_and_what_shrinks_it() -> None:
    assert not survey.check_gpu_memory(NODE.gpus, 8, ESTIMATE).problem
    small = Gpu("T4", 16 * GIB, 15 * GIB, 7.5)
    told = survey.check_gpu_memory((A100, small), 2, ESTIMATE).problem
    assert "needs about 21.0 GiB (most of it layer inputs, 20.0 GiB) and GPU 1 has 16.0 GiB; raise parallel.cp" in told
    assert not survey.check_gpu_memory((A100, small), 1, ESTIMATE).problem, "the second GPU is not used"
    for part, mend in (
        ("frozen weights", "parallel.engine: zero3"),
        ("frozen weights, shard", "parallel.offload.params: cpu"),
        ("activations", "train.recompute: full"),
    ):
        heavy = replace(ESTIMATE, gpu={part: 90 * GIB})
        assert mend in survey.check_gpu_memory((A100,), 1, heavy).problem


def test_gpu_memory_taken_by_others() -> None:
    busy = replace(A100, free=10 * GIB)
    told = survey.check_gpu_memory((A100, busy), 2, ESTIMATE).problem
    assert "GPU 1 has 10.0 GiB free of 80.0 GiB and needs about 21.0 GiB; end the other processes" in told


def test_host_memory_counts_every_process_and_the_save() -> None:
    assert not survey.check_host_memory(163 * GIB, "this machine", 8, ESTIMATE).problem
    told = survey.check_host_memory(162 * GIB, "the container's limit", 8, ESTIMATE).problem
    assert "8 processes need about 163.0 GiB (4.0 GiB process + 16.0 GiB frozen weights, shard; each)" in told
    assert "the container's limit leaves 162.0 GiB" in told and "parallel.offload to none" in told
    plain = replace(ESTIMATE, host={"process": 4 * GIB})
    assert "parallel.offload" not in survey.check_host_memory(GIB, "this machine", 8, plain).problem


def test_shared_memory() -> None:
    assert not survey.check_shared_memory(GIB, 8).problem
    assert not survey.check_shared_memory(None, 1).problem, "one process sends nothing"
    assert "NCCL needs about 1.0 GiB there for 8 processes and 0.1 GiB is free" in (
        survey.check_shared_memory(64 * MIB, 8).problem
    )
    assert "--shm-size" in survey.check_shared_memory(None, 2).problem


def test_layout() -> None:
    config = load_config(ROOT / "launch/configs/llama2_70b_32k.yaml")
    whole, plan = survey.check_layout(config, None, 8)
    assert plan is None, "nothing is known of the model"
    assert not whole.problem and whole.found == "tp 1 x cp 8 x pp 1 x dp 1, 64 micro-batches a step"
    assert "does not divide the 7 launched processes" in survey.check_layout(config, None, 7)[0].problem
    odd = replace(config, train=replace(config.train, global_batch=63))
    assert "train.global_batch: 63 is not a multiple" in survey.check_layout(odd, None, 16)[0].problem


def test_model_files(tmp_path: Path) -> None:
    def check() -> str:
        return files.check_model(base, weights_bytes)[0].problem

    base = tmp_path / "base"
    assert f"model.path: {base} is not a folder" in check()
    make_tiny(base, "llama2")
    finding, arch = files.check_model(base, weights_bytes)
    assert not finding.problem and arch is not None and arch.layers == 2
    weights = (base / "model.safetensors").read_bytes()
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "model-1.safetensors").write_bytes(weights)
    assert "holds both model.safetensors and shards that model.safetensors.index.json names" in check()
    (base / "model.safetensors").unlink()
    assert "model-2.safetensors: is missing (1 of 2 shards are)" in check()
    (base / "model-2.safetensors").write_bytes(weights[:-8])
    assert "model-2.safetensors: is truncated or damaged" in check()
    (base / "model.safetensors.index.json").unlink()
    (base / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40))
    assert "model.safetensors: is truncated or damaged" in check()
    (base / "model.safetensors").write_bytes(weights)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    assert "belong to different models" in check()
    (base / "config.json").unlink()
    assert "config.json does not exist" in check()


def test_tokenizer(tmp_path: Path) -> None:
    def check(path: Path, rows: int | None = 64) -> str:
        return files.check_tokenizer(path, rows).problem

    assert f"Tokenizer: {tmp_path}: holds no tokenizer; copy the model's" in check(tmp_path)
    write_tokenizer(tmp_path)
    finding = files.check_tokenizer(tmp_path, 128)
    assert not finding.problem and finding.found == "99 tokens"
    assert not check(tmp_path, None)
    assert check(tmp_path).startswith("data.tokenizer: has 99 tokens, the model 64; use the model's own tokenizer")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    assert "its tokenizer names no end-of-text token; set eos_token in tokenizer_config.json" in check(tmp_path, 128)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert "is not a readable sentencepiece model" in check(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope": RopeSettings(type="linear", factor=1.5)}, "1.5 times the original context 64 is 96, less than model"),
        (
            {"context": 48, "rope": RopeSettings(original_context=32)},
            "context 48 fits the checkpoint's own 64, so type",
        ),
        ({"vocab": 100}, "model.vocab: 100 rows are fewer than the checkpoint's 128"),
    ],
)
def test_settings_that_do_not_fit_the_checkpoint(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    stored = read_arch(make_tiny(tmp_path / "base", "llama2", max_position_embeddings=64))
    finding, (arch, rope) = files.check_settings(ModelConfig("base", 128, vocab=131), stored)
    assert not finding.problem and arch.vocab == 131 and rope.factor == 2
    assert finding.found == "RoPE linear, factor 2, base 10,000, 131 vocabulary rows"
    finding, (arch, rope) = files.check_settings(replace(ModelConfig("base", 128), **change), stored)
    assert said in finding.problem and arch == stored and rope.factor == 1


def test_text_is_there_and_not_empty(tmp_path: Path) -> None:
    def check(path: Path, field: str = "text") -> str:
        return files.check_text("data.path", path, 8, field).problem

    assert "does not exist; point it at text" in check(tmp_path / "none")
    assert "holds no file ending in" in check(tmp_path)
    (tmp_path / "a.txt").write_text("")
    assert f"data.path: the 1 text file is empty at {tmp_path}; give" in check(tmp_path)
    (tmp_path / "a.txt").write_text("words")
    assert not check(tmp_path, "body")
    # Of every JSONL file the first record is read and no other.
    (tmp_path / "b.jsonl").write_text('\n{"body": "words"}\nnot JSON\n')
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(b'{"content": "words"}\n'))
    told = check(tmp_path)
    assert told.startswith(f"data.path: {tmp_path / 'b.jsonl'}: line 2 has no field 'text' (it has body)")
    assert f"{tmp_path / 'c.jsonl.xz'}: line 1 has no field 'body' (it has content)" in check(tmp_path, "body")
    (tmp_path / "c.jsonl.xz").unlink()
    assert not check(tmp_path, "body")


def test_prepared_tokens_are_whole_and_long_enough(tmp_path: Path) -> None:
    config, model = tiny_run(tmp_path)
    tokens = Path(config.data.path)
    size = read_manifest(tokens).tokens
    assert not files.check_text("data.path", tokens, size - 1, "text").problem
    told = files.check_text("eval.path", tokens, size, "text").problem
    assert told.startswith(f"eval.path: {tokens} holds {size} tokens and one window needs {size + 1}")
    shard = tokens / "tokens-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert "tokens-00000.bin is not whole" in files.check_text("data.path", tokens, 8, "text").problem
    shard.unlink()
    assert "tokens-00000.bin is missing" in files.check_text("data.path", tokens, 8, "text").problem


def test_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not files.check_writable(tmp_path / "new/run").problem
    (tmp_path / "file").write_text("")
    assert f"output: {tmp_path / 'file'} is a file" in files.check_writable(tmp_path / "file").problem
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert f"output: {tmp_path} cannot be written" in files.check_writable(tmp_path / "new/run").problem


def test_an_earlier_run_of_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    config = replace(load_config(ROOT / "launch/configs/llama2_70b_32k.yaml"), output=str(tmp_path / "run"))
    assert files.check_earlier_run(config).found == "none"
    older, newer = (tmp_path / f"run/checkpoints/step-{step:06d}" for step in (10, 20))
    for folder, rank in ((older, 8), (newer, 16)):
        folder.mkdir(parents=True)
        begun = config_dict(replace(config, lora=replace(config.lora, rank=rank)))
        told = manifest_bytes({"format": 2, "step": 0, "updates": 0, "config": begun, "tensors": {}, "files": {}})
        (folder / "manifest.json").write_bytes(told)
        (folder / "manifest.sha256").write_text(checksum_text(hashlib.sha256(told).hexdigest()))
    told = files.check_earlier_run(config).problem
    assert told.startswith("Resume: lora.rank was 16 in the checkpoint and is 8 now")
    # The run would set a damaged one aside and go on from the older.
    (newer / "manifest.json").write_text("{}")
    finding = files.check_earlier_run(config)
    assert not finding.problem and finding.found == "step-000010"
    with monkeypatch.context() as patch:  # root may read anywhere
        patch.setattr(Path, "iterdir", refuse)
        told = files.check_earlier_run(config).problem
        assert (
            told == f"output: {tmp_path / 'run/checkpoints'} cannot be read (Permission denied); check its permissions."
        )
    (older / "manifest.json").write_bytes(manifest_bytes({"format": 3}))
    (older / "manifest.sha256").write_text(checksum_text(hashlib.sha256(manifest_bytes({"format": 3})).hexdigest()))
    assert "has format 3" in files.check_earlier_run(config).problem


def test_disk_adds_up_what_goes_to_one_file_system(tmp_path: Path) -> None:
    kept, tokens = Space("checkpoints", tmp_path, 9 * GIB, 10 * GIB, 1), Space("tokens", tmp_path, 2 * GIB, 10 * GIB, 1)
    assert [finding.problem for finding in survey.check_disk([kept, replace(tokens, device=2)])] == ["", ""]
    (finding,) = survey.check_disk([kept, tokens])
    assert "needs about 11.0 GiB (9.0 GiB checkpoints + 2.0 GiB tokens) and has 10.0 GiB free" in finding.problem


def test_disk_needs_shrink_as_files_appear(tmp_path: Path) -> None:
    config = replace(load_config(ROOT / "launch/configs/llama2_70b_32k.yaml"), output=str(tmp_path / "run"))
    assert survey.checkpoint_bytes(config, ESTIMATE) == 3 * ESTIMATE.checkpoint, "two kept, one being written"
    for step in range(2):
        (tmp_path / f"run/checkpoints/step-{step:06d}").mkdir(parents=True)
    assert survey.checkpoint_bytes(config, ESTIMATE) == ESTIMATE.checkpoint
    text, cache = tmp_path / "text", tmp_path / "cache"
    text.mkdir()
    (text / "a.txt").write_bytes(b"x" * 3000)
    packed = lzma.compress(os.urandom(1500).hex().encode())
    (text / "b.jsonl.xz").write_bytes(packed)
    assert survey.token_bytes([text], cache, 32000) == 2 * (1000 + len(packed) * 4 // 3)
    assert survey.token_bytes([text], cache, 128256) == 4 * (1000 + len(packed) * 4 // 3)
    (cache / "text-0123").mkdir(parents=True)
    (cache / "text-0123/manifest.json").write_text("{}")
    assert survey.token_bytes([text], cache, 32000) == 0


def tiny_run(folder: Path) -> tuple[RunConfig, Path]:
    """A run whose files are all there."""
    from tools.support.shrink import shrink
    from tools.support.tiny_checkpoint import write_files

    tiny = shrink(load_config(ROOT / "launch/configs/llama2_70b_32k.yaml", ["parallel.cp=2"]), folder)
    write_files(tiny.config, tiny.model)
    return tiny.config, Path(tiny.config.model.path)


def test_survey_of_a_run_that_has_everything_and_of_one_that_has_nothing(tmp_path: Path) -> None:
    config, base = tiny_run(tmp_path)
    whole = survey.survey(config, Launch(4), NODE, weights_bytes)
    assert [finding.problem for finding in whole] == [""] * len(whole)
    names = [finding.name for finding in whole]
    expected = ["GPUs", "Layout", "GPU memory", "Host memory", "/dev/shm", "Model", "Model settings", "Tokenizer"]
    expected += ["data.path", "Output", "Earlier run"]
    assert names[: len(expected)] == expected and names[-1].startswith("Disk at")
    told = io.StringIO()
    show(whole, Console(file=told, width=140))
    assert "MISSING" not in told.getvalue() and "Host memory" in told.getvalue()

    # Every wrong setting is told at once, each by its own check, and the memory is still estimated.
    wrong = replace(config, model=replace(config.model, rope=RopeSettings(type="linear", factor=1.5)))
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "words"}')
    wrong = replace(wrong, data=replace(config.data, path=str(text), text_field="foo"))
    problems = {finding.name: finding.problem for finding in survey.survey(wrong, Launch(4), NODE, weights_bytes)}
    assert {name for name, problem in problems.items() if problem} == {"Model settings", "data.path"}
    assert "GPU memory" in problems

    (base / "config.json").unlink()
    poor = Machine((), GIB, "this machine", 64 * MIB)
    problems = {finding.name: finding.problem for finding in survey.survey(config, Launch(4), poor, weights_bytes)}
    assert {name for name, problem in problems.items() if problem} == {"GPUs", "/dev/shm", "Model"}
    assert "GPU memory" not in problems, "nothing is known of it without the model"


def test_the_70b_run_needs_what_its_yaml_says() -> None:
    from tools.support.shapes import llama2

    path = ROOT / "launch/configs/llama2_70b_32k.yaml"
    config = load_config(path)
    estimate = RunPlan.of(config, *plan_model(config.model, llama2("70b")), 8, 80 * 10**9).memory()
    said = f"About {estimate.gpu_total / GIB:.0f} GiB a GPU, {estimate.host_total(8) / GIB:.0f} GiB of host memory"
    assert said in path.read_text()


def test_host_memory_too_small_for_the_halos_is_told_by_how_much() -> None:
    """1M tokens in chunks of 16k: 63 halos of 256 MiB, beside the process and what a save gathers."""
    from tools.support.shapes import llama3_8b

    def problem(host: int, *settings: str) -> str:
        config = load_config(
            ROOT / "launch/configs/llama3_8b_1m.yaml", ["train.stream=16384", "train.gate_up=gpu", *settings]
        )
        estimate = RunPlan.of(config, *plan_model(config.model, llama3_8b()), 1).memory()
        return survey.check_host_memory(host, "this machine", 1, estimate).problem

    quiet = "eval.lengths=[8192]"
    told = problem(20 * GIB, quiet)
    assert "15.8 GiB parked halos" in told and "GiB more), or raise train.stream" in told
    assert problem(40 * GIB, quiet) == ""
    assert "GiB evaluation's keys and values" in (told := problem(40 * GIB, "eval.lengths=[262144]"))
    assert told.endswith("or lower eval.lengths and eval.ruler_lengths.")
    asks = ["eval.tasks=[ruler]", "eval.ruler_lengths=[262144]", "eval.ruler_trials=1"]
    assert "32.0 GiB evaluation's keys and values" in problem(40 * GIB, quiet, *asks), "128 KiB a token"
    config = load_config(ROOT / "launch/configs/llama3_8b_1m.yaml")
    plan = survey.check_layout(config, plan_model(config.model, llama3_8b()), 1, Device("", 80 * GIB, 1, 0, 9.0))[1]
    assert plan is not None and plan.stream == 32768, "auto is planned for the GPUs that are there"


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tools.preflight.read_machine", lambda: NODE)
    config = str(ROOT / "launch/configs/llama2_70b_32k.yaml")
    _, base = tiny_run(tmp_path)
    tokens = tmp_path / "tokens"
    there = [f"model.path={base}", f"data.path={tokens}", f"eval.path={tokens}", f"output={tmp_path / 'run'}"]
    there += [f"data.tokenizer={tmp_path / 'tokenizer.model'}", "data.sequence=64", "eval.lengths=[32]"]
    long = tmp_path / "long.txt"
    long.write_text("words")
    sets = [word for text in ("parallel.cp=2", *there) for word in ("--set", text)]
    assert main(["--config", config, *sets]) == 0
    assert "Preflight" in capsys.readouterr().out
    assert main(["--config", config, *sets, "--set", "eval.lengths=[40000]", "--set", f"eval.path={long}"]) == 0
    assert capsys.readouterr().err.startswith("warning: eval.lengths: 40000 exceed model.context 32768")
    assert main(["--config", config, *sets, "--set", "parallel.cp=8", "--set", "attention.group_size=32"]) == 0
    told = capsys.readouterr().err
    assert "warning: attention: with tp 1 x cp 8 and groups of 32 tokens " in told
    assert told.startswith(f"warning: eval.path: {tokens} is training text (data.path)")
    assert main(["--config", config, *sets, "--nproc", "4", "--nnodes", "3"]) == 2
    assert "missing: train.global_batch: 64 is not a multiple of micro_batch 1 x 6" in capsys.readouterr().err
    assert main(["--config", config, "--set", "train.step=3"]) == 2
    assert capsys.readouterr().err.startswith("error: train.step: unknown key")
    for option in ("--nproc", "--nnodes"):
        with pytest.raises(SystemExit, match="2"):
            main(["--config", config, option, "0"])
        assert f"{option}: must be a whole number, 1 or more, got '0'" in capsys.readouterr().err


def test_starting_needs_no_torch() -> None:
    program = "import sys, tools.preflight; sys.exit(bool({'torch', 'megatron', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_fewer_windows_than_a_batch_are_told(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("x" * 1000)
    (told,) = files.check_text("data.path", text, 100, "text", batch=11).advice
    assert told.startswith("data.path: holds 10 windows and train.global_batch is 11, so one optimizer step reads")
    assert files.check_text("data.path", text, 100, "text", batch=10).advice == ()
