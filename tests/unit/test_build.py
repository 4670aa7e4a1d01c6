"""Composing a run: what is refused before anything is allocated, and what only rank 0 reads."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.errors import CheckpointError, ConfigError
from parallel.world.grid import plan_grid
from parallel.world.groups import destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline import build as composition
from pipeline.checkpoint.compatibility import check_output
from pipeline.config.parallel import ParallelConfig
from pipeline.config.yaml_file import load_config
from pipeline.evaluation.entry import evaluate_state
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.model.layers import transformer_engine
from pipeline.planning.arch import read_arch
from pipeline.planning.run_plan import plan_run
from pipeline.train import main, train
from tests.numerics.test_training import write_run
from tests.support import te_standin
from tests.support.ranks import run_ranks
from tests.support.runs import build_run


def change(base: Path, how: str) -> None:
    """Damage a base checkpoint in one of the ways downloads and mix-ups do."""
    weights = load_file(base / "model.safetensors")
    if how == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif how == "extra":
        weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    else:
        weights["model.norm.weight"] = torch.zeros(3)
    save_file(weights, base / "model.safetensors")


@pytest.mark.parametrize(
    ("how", "tensor"),
    [
        ("missing", "model.layers.1.mlp.up_proj.weight"),
        ("extra", "model.layers.7.mlp.up_proj.weight"),
        ("misshaped", "model.norm.weight"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_before_allocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, tensor: str
) -> None:
    config = load_config(write_run(tmp_path, "run"), [])
    change(tmp_path / "base", how)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was allocated")

    monkeypatch.setattr(composition, "RankModel", never)
    for work in (
        lambda: build_run(config, RankEnv()),
        lambda: evaluate_state(config, RankEnv(), "untrained"),
    ):
        with pytest.raises(CheckpointError) as refused:
            work()
        assert tensor in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_backend_this_device_lacks_is_refused_before_anything_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_run(tmp_path, "run"), ["attention.backend=cudnn"])

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("text was tokenized, or the model allocated")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(composition, "RankModel", never)
    monkeypatch.setattr(composition, "open_tokens", never)
    with pytest.raises(ConfigError, match=r"attention\.backend: cudnn needs a CUDA device.*use auto or math"):
        build_run(config, RankEnv())


def test_families_that_are_not_trained_are_refused_before_tokenizing(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, "run"), [])
    described = json.loads((tmp_path / "base" / "config.json").read_text()) | {"architectures": ["Gemma3ForCausalLM"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"^model\.path: .*'Gemma3ForCausalLM' is not supported; use one"):
        plan_run(config, 1)


def test_ranks_with_other_tokens_or_layers_draw_other_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write_run(tmp_path, "run"), ["parallel={tp: 2, cp: 2, pp: 2}"])
    streams: list[int] = []
    monkeypatch.setattr(composition, "make_groups", lambda *_, **__: SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(composition, "seed_everything", lambda seed, stream: streams.append(stream))
    # The tiny model's heads would not divide over the grid; the streams do not ask for them.
    plan = replace(plan_run(replace(config, parallel=ParallelConfig()), 1), config=config, grid=plan_grid(16, 2, 2, 2))
    for rank in range(16):
        composition.connect(plan, RankEnv(rank, 16, rank, launched=True))
    assert streams[0::2] == streams[1::2], "tensor-parallel ranks share a stream"
    assert len(set(streams[0::2])) == 8, "and nobody else does"


def build_and_count(rank: int, world: int, path: str) -> tuple[str, int]:
    """The base hash in the manifest, and how often this rank computed it."""
    computed: list[int] = []
    original = HfCheckpoint.base_hash

    def counted(self: HfCheckpoint) -> str:
        computed.append(rank)
        return original(self)

    HfCheckpoint.base_hash = counted  # type: ignore[method-assign]
    run = build_run(load_config(Path(path), []), RankEnv.read())
    run.trainer.parts.loader.close()
    destroy_groups()
    return run.trainer.parts.manifest["base_hash"], len(computed)


def test_only_rank_0_reads_all_weights_for_their_hash(tmp_path: Path) -> None:
    path = write_run(tmp_path, "run")
    own = HfCheckpoint(tmp_path / "base").base_hash()
    assert run_ranks(build_and_count, 2, str(path)) == [(own, 1), (own, 0)]


def test_model_vocab_adds_rows_and_never_drops_them(tmp_path: Path) -> None:
    path = write_run(tmp_path, "run")
    grown = load_config(path, ["model.vocab=131"])
    arch = plan_run(grown, 1).arch
    assert arch.vocab == 131
    # The base is checked against its own rows, and the model is allocated with the new ones.
    base = composition.open_base(grown, arch)
    assert base.facts["model.embed_tokens.weight"].shape[0] == 128
    with pytest.raises(ConfigError, match="model.vocab: 100 rows are fewer than the checkpoint's 128"):
        plan_run(load_config(path, ["model.vocab=100"]), 1)


def test_other_settings_are_refused_before_the_base_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path, "run")
    train(load_config(path, ["train.steps=1", "train.warmup_steps=0"]), RankEnv())
    opened: list[str] = []

    def open_base(config: Any, arch: Any) -> Any:
        opened.append(config.model.path)
        raise CheckpointError("opened")

    monkeypatch.setattr(composition, "open_base", open_base)
    with pytest.raises(ConfigError, match=r"^Resume: lora\.rank was 4 in the checkpoint and is 2 now"):
        build_run(load_config(path, ["lora.rank=2", "train.warmup_steps=0"]), RankEnv())
    assert not opened
    # As it was begun, with settings spelled out that had been derived, it goes on.
    same = ["train.warmup_steps=0", "data.sequence=64", "train.lr_embed_norm=5e-3"]
    with pytest.raises(CheckpointError, match="opened"):
        build_run(load_config(path, same), RankEnv())
    # What a damaged manifest says is not held against anyone: the run itself sets that checkpoint aside.
    (manifest,) = (tmp_path / "run" / "checkpoints").glob("step-*/manifest.json")
    manifest.write_bytes(manifest.read_bytes()[:-20])
    assert check_output(load_config(path, ["lora.rank=2"])) is None


@pytest.mark.parametrize(
    ("capability", "dtype", "said"),
    [((8, 9), "bf16", "scale a row"), ((9, 0), "fp32", "products in bf16 on a GPU, and model.dtype is fp32")],
)
def test_fp8_is_refused_where_a_gpu_cannot_multiply_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    config = load_config(write_run(tmp_path, "fp8"), ["model.base=fp8", f"model.dtype={dtype}"])
    with pytest.raises(ConfigError, match=said):
        composition.check_backend(config, read_arch(Path(config.model.path)), torch.device("cuda"))


@pytest.mark.parametrize("installed", [False, True])
def test_a_machine_without_transformer_engine_says_so_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], installed: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(composition, "open_base", lambda *_: pytest.fail("the base was opened"))
    monkeypatch.setattr(transformer_engine.importlib.util, "find_spec", lambda name: "there" if installed else None)
    path = write_run(tmp_path, "te")
    assert main(["--config", str(path), "--set", "model.family=te"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "model.family" in line]
    wanted = "needs a CUDA device, but this is cpu" if installed else "needs Transformer Engine, which is not installed"
    assert len(told) == 1 and wanted in told[0] and told[0].endswith("set model.family: local.")


def test_a_transformer_engine_that_does_not_load_or_run_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    with te_standin.standing_in():
        transformer_engine.check_transformer_engine(cuda, "tensorwise")
        package = sys.modules["transformer_engine.pytorch"]
        with monkeypatch.context() as patched:
            patched.setattr(package, "is_fp8_available", lambda return_reason: (False, "Device is too old."))
            with pytest.raises(ConfigError, match=r"fp8_recipe: tensorwise cannot run here \(Device is too old\);"):
                transformer_engine.check_transformer_engine(cuda, "tensorwise")
        with monkeypatch.context() as patched:
            patched.setattr(sys.modules[te_standin.WRAPPERS], "HAVE_TE", False)
            with pytest.raises(ConfigError, match="is installed but does not load"):
                transformer_engine.check_transformer_engine(cuda, "none")
