"""Each thing that may be missing gives its own sentence, on facts handed in; what is there gives none."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import preflight
from pipeline.config import load_config
from pipeline.memory import GIB, MemoryEstimate, estimate_memory
from pipeline.preflight import Gpu, Launch, Machine, Space
from pipeline.schema import RunConfig
from tests.tiny_models import make_tiny
from tools import machine as machines
from tools.preflight import main, show, weights_bytes

ROOT = Path(__file__).parents[2]
A100 = Gpu("NVIDIA A100-SXM4-80GB", 80 * GIB, 79 * GIB)
NODE = Machine((A100,) * 8, 500 * GIB, "this machine", 8 * GIB)
ESTIMATE = MemoryEstimate(
    gpu={"layer inputs": 20 * GIB, "optimizer": GIB},
    host={"process": 4 * GIB, "frozen weights, shard": 16 * GIB},
    host_once=3 * GIB,
    checkpoint=3 * GIB,
)
MIB = 2**20


def test_gpus_one_a_process() -> None:
    assert not preflight.check_gpus(NODE.gpus, 8).problem
    assert "PyTorch sees none, and 8 are needed" in preflight.check_gpus((), 8).problem
    few = preflight.check_gpus(NODE.gpus[:4], 8)
    assert "8 processes need one each and 4 are visible; pass --nproc 4" in few.problem
    assert few.found == "4 (NVIDIA A100-SXM4-80GB)"


def test_gpu_memory_too_small_names_the_largest_part_and_what_shrinks_it() -> None:
    assert not preflight.check_gpu_memory(NODE.gpus, 8, ESTIMATE).problem
    small = Gpu("T4", 16 * GIB, 15 * GIB)
    told = preflight.check_gpu_memory((A100, small), 2, ESTIMATE).problem
    assert "needs about 21.0 GiB (most of it layer inputs, 20.0 GiB) and GPU 1 has 16.0 GiB; raise parallel.cp" in told
    assert not preflight.check_gpu_memory((A100, small), 1, ESTIMATE).problem, "the second GPU is not used"
    for part, mend in (
        ("frozen weights", "parallel.engine: zero3"),
        ("frozen weights, shard", "parallel.offload.params: cpu"),
        ("activations", "train.recompute: full"),
    ):
        heavy = replace(ESTIMATE, gpu={part: 90 * GIB})
        assert mend in preflight.check_gpu_memory((A100,), 1, heavy).problem


def test_gpu_memory_taken_by_others() -> None:
    busy = replace(A100, free=10 * GIB)
    told = preflight.check_gpu_memory((A100, busy), 2, ESTIMATE).problem
    assert "GPU 1 has 10.0 GiB free of 80.0 GiB and needs about 21.0 GiB; end the other processes" in told


def test_host_memory_counts_every_process_and_the_save() -> None:
    assert not preflight.check_host_memory(163 * GIB, "this machine", 8, ESTIMATE).problem
    told = preflight.check_host_memory(162 * GIB, "the container's limit", 8, ESTIMATE).problem
    assert "8 processes need about 163.0 GiB (4.0 GiB process + 16.0 GiB frozen weights, shard; each)" in told
    assert "the container's limit leaves 162.0 GiB" in told and "parallel.offload to none" in told
    plain = replace(ESTIMATE, host={"process": 4 * GIB})
    assert "parallel.offload" not in preflight.check_host_memory(GIB, "this machine", 8, plain).problem


def test_shared_memory() -> None:
    assert not preflight.check_shared_memory(GIB, 8).problem
    assert not preflight.check_shared_memory(None, 1).problem, "one process sends nothing"
    assert "NCCL needs about 1.0 GiB there for 8 processes and 0.1 GiB is free" in (
        preflight.check_shared_memory(64 * MIB, 8).problem
    )
    assert "--shm-size" in preflight.check_shared_memory(None, 2).problem


def test_layout() -> None:
    config = load_config(ROOT / "launch/configs/llama2_70b_32k.yaml")
    whole = preflight.check_layout(config, None, 8)
    assert not whole.problem and whole.found == "tp 1 x cp 2 x pp 1 x dp 4, 16 micro-batches a step"
    assert "does not divide the 7 launched processes" in preflight.check_layout(config, None, 7).problem
    odd = replace(config, train=replace(config.train, global_batch=63))
    assert "train.global_batch: 63 is not a multiple" in preflight.check_layout(odd, None, 8).problem


def test_model_files(tmp_path: Path) -> None:
    def check() -> str:
        return preflight.check_model(base, weights_bytes)[0].problem

    base = tmp_path / "base"
    assert f"model.path: {base} is not a folder" in check()
    make_tiny(base, "llama2")
    finding, arch = preflight.check_model(base, weights_bytes)
    assert not finding.problem and arch is not None and arch.layers == 2
    weights = (base / "model.safetensors").read_bytes()
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "model-1.safetensors").write_bytes(weights)
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
    assert f"Tokenizer: {tmp_path} holds none" in preflight.check_tokenizer(tmp_path).problem
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert not preflight.check_tokenizer(tmp_path).problem
    assert not preflight.check_tokenizer(tmp_path / "tokenizer.model").problem


def test_text_is_there_and_not_empty(tmp_path: Path) -> None:
    def check(path: Path, length: int = 8) -> str:
        return preflight.check_text("data.path", path, length).problem

    assert "no such file or folder" in check(tmp_path / "none")
    assert "holds no file ending in" in check(tmp_path)
    (tmp_path / "a.txt").write_text("")
    assert f"data.path: the 1 text files at {tmp_path} are empty" in check(tmp_path)
    (tmp_path / "a.txt").write_text("words")
    assert not check(tmp_path)


def test_prepared_tokens_are_whole_and_long_enough(tmp_path: Path) -> None:
    config, model = tiny_run(tmp_path)
    tokens = Path(config.data.path)
    size = preflight.read_manifest(tokens).tokens
    assert not preflight.check_text("data.path", tokens, size - 1).problem
    told = preflight.check_text("eval.path", tokens, size).problem
    assert told.startswith(f"eval.path: {tokens} holds {size} tokens and one window needs {size + 1}")
    shard = tokens / "tokens-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert "tokens-00000.bin is not whole" in preflight.check_text("data.path", tokens, 8).problem
    shard.unlink()
    assert "tokens-00000.bin is missing" in preflight.check_text("data.path", tokens, 8).problem


def test_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not preflight.check_writable(tmp_path / "new/run").problem
    (tmp_path / "file").write_text("")
    assert f"output: {tmp_path / 'file'} is a file" in preflight.check_writable(tmp_path / "file").problem
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert f"output: {tmp_path} cannot be written" in preflight.check_writable(tmp_path / "new/run").problem


def test_disk_adds_up_what_goes_to_one_file_system(tmp_path: Path) -> None:
    kept, tokens = Space("checkpoints", tmp_path, 9 * GIB, 10 * GIB, 1), Space("tokens", tmp_path, 2 * GIB, 10 * GIB, 1)
    assert [finding.problem for finding in preflight.check_disk([kept, replace(tokens, device=2)])] == ["", ""]
    (finding,) = preflight.check_disk([kept, tokens])
    assert "needs about 11.0 GiB (9.0 GiB checkpoints + 2.0 GiB tokens) and has 10.0 GiB free" in finding.problem


def test_disk_needs_shrink_as_files_appear(tmp_path: Path) -> None:
    config = replace(load_config(ROOT / "launch/configs/llama2_70b_32k.yaml"), output=str(tmp_path / "run"))
    assert preflight.checkpoint_bytes(config, ESTIMATE) == 3 * ESTIMATE.checkpoint, "two kept, one being written"
    for step in range(2):
        (tmp_path / f"run/checkpoints/step-{step:06d}").mkdir(parents=True)
    assert preflight.checkpoint_bytes(config, ESTIMATE) == ESTIMATE.checkpoint
    text, cache = tmp_path / "text", tmp_path / "cache"
    text.mkdir()
    (text / "a.txt").write_bytes(b"x" * 3000)
    (text / "b.jsonl.xz").write_bytes(b"x" * 3000)
    assert preflight.token_bytes([text], cache, 32000) == 2 * (1000 + 4000)
    assert preflight.token_bytes([text], cache, 128256) == 4 * (1000 + 4000)
    (cache / "text-0123").mkdir(parents=True)
    (cache / "text-0123/manifest.json").write_text("{}")
    assert preflight.token_bytes([text], cache, 32000) == 0


def tiny_run(folder: Path) -> tuple[RunConfig, Path]:
    """A run whose files are all there."""
    from tools.shrink import shrink
    from tools.tiny_checkpoint import write_files

    tiny = shrink(load_config(ROOT / "launch/configs/llama2_70b_32k.yaml"), folder)
    write_files(tiny.config, tiny.model)
    return tiny.config, Path(tiny.config.model.path)


def test_survey_of_a_run_that_has_everything_and_of_one_that_has_nothing(tmp_path: Path) -> None:
    config, base = tiny_run(tmp_path)
    whole = preflight.survey(config, Launch(4), NODE, weights_bytes)
    assert [finding.problem for finding in whole] == [""] * len(whole)
    names = [finding.name for finding in whole]
    expected = ["GPUs", "Layout", "GPU memory", "Host memory", "/dev/shm", "Model", "Tokenizer", "data.path", "Output"]
    assert names[: len(expected)] == expected and names[-1].startswith("Disk at")
    told = io.StringIO()
    show(whole, Console(file=told, width=140))
    assert "MISSING" not in told.getvalue() and "Host memory" in told.getvalue()

    (base / "config.json").unlink()
    poor = Machine((), GIB, "this machine", 64 * MIB)
    problems = {finding.name: finding.problem for finding in preflight.survey(config, Launch(4), poor, weights_bytes)}
    assert {name for name, problem in problems.items() if problem} == {"GPUs", "/dev/shm", "Model"}
    assert "GPU memory" not in problems, "nothing is known of it without the model"


def test_the_70b_run_needs_what_its_yaml_says() -> None:
    from parallel.plan import plan_grid
    from tools.shapes import llama2

    path = ROOT / "launch/configs/llama2_70b_32k.yaml"
    estimate = estimate_memory(load_config(path), llama2("70b"), plan_grid(8, 1, 2, 1))
    said = f"About {estimate.gpu_total / GIB:.0f} GiB a GPU, {estimate.host_total(8) / GIB:.0f} GiB of host memory"
    assert said in path.read_text()


def test_control_groups_limit_the_host(tmp_path: Path) -> None:
    def group(name: str, limit: str, used: int, cache: int) -> None:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")

    group("slurm/job", "max", 100, 0)
    assert machines.cgroup_free("0::/slurm/job\n", tmp_path) is None
    group("slurm", "1000", 300, 100)
    assert machines.cgroup_free("0::/slurm/job\n", tmp_path) == 800, "the parent's limit holds; its cache is given back"
    group("slurm/job", "500", 450, 0)
    assert machines.cgroup_free("0::/slurm/job\n", tmp_path) == 50
    group("", "700", 0, 0)
    assert machines.cgroup_free("0::/known/to/the/host\n", tmp_path) == 700, "a container's own root"
    old = tmp_path / "memory/docker"
    old.mkdir(parents=True)
    for name, text in (("limit", "900"), ("usage", "300")):
        (old / f"memory.{name}_in_bytes").write_text(text)
    (old / "memory.stat").write_text("total_inactive_file 50\n")
    assert machines.cgroup_free("5:memory:/docker\n4:cpu:/docker\n", tmp_path) == 650


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tools.preflight.read_machine", lambda: NODE)
    config = str(ROOT / "launch/configs/llama2_70b_32k.yaml")
    _, base = tiny_run(tmp_path)
    tokens = tmp_path / "tokens"
    there = [f"model.path={base}", f"data.path={tokens}", f"eval.path={tokens}", f"output={tmp_path / 'run'}"]
    there += [f"data.tokenizer={tmp_path / 'tokenizer.model'}", "data.sequence=64", "eval.lengths=[32]"]
    sets = [word for text in there for word in ("--set", text)]
    assert main(["--config", config, *sets]) == 0
    assert "Preflight" in capsys.readouterr().out
    assert main(["--config", config, *sets, "--nproc", "4", "--nnodes", "3"]) == 2
    assert "missing: train.global_batch: 64 is not a multiple of micro_batch 1 x 6" in capsys.readouterr().err
    assert main(["--config", config, "--set", "train.step=3"]) == 2
    assert capsys.readouterr().err.startswith("error: train.step: unknown key")
    assert main(["--config", config, "--nproc", "0"]) == 2
    assert "--nproc: must be at least 1" in capsys.readouterr().err


def test_starting_needs_no_torch() -> None:
    program = "import sys, tools.preflight; sys.exit(bool({'torch', 'megatron', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
