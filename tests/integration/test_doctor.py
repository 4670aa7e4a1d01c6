"""`tools.doctor` passes what is right, finds each planted fault in the row that names it, and exits as it says."""

from __future__ import annotations

import contextlib
import io
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from parallel.errors import ConfigError
from parallel.world.grid import plan_stages
from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import load_config
from tests.support.tiny_models import make_tiny
from tools.doctor import Report, main, run_doctor, run_doctors, show
from tools.support.local_ranks import RankFailed
from tools.support.shrink import VOCAB, shrink

pytestmark = pytest.mark.usefixtures("forked")
ROOT = Path(__file__).parents[2]
YAML = """
model: {{path: {model}, context: 32768}}
lora: {{dropout: 0.1}}
data: {{path: data/none}}
train: {{steps: 1000, trainable: [lora, embed, norm]}}
parallel: {{tp: {tp}, cp: {cp}, pp: {pp}}}
output: runs/none
"""


def write(folder: Path, model: str = "models/none", tp: int = 1, cp: int = 1, pp: int = 1) -> Path:
    path = folder / f"tp{tp}-cp{cp}-pp{pp}.yaml"
    path.write_text(YAML.format(model=model, tp=tp, cp=cp, pp=pp))
    return path


def failed(report: Report) -> set[str]:
    return {row.name for row in report.rows if not row.passed}


def test_right_grids_pass_and_each_planted_fault_is_found(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", "smollm2", num_attention_heads=12, num_key_value_heads=4, head_dim=12)
    context = load_config(write(tmp_path, tp=2, cp=2))
    stages = load_config(write(tmp_path, model=str(base), tp=2, pp=2))
    chunks = ["attention.group_size=8192", "train.stream=16384"]
    streamed = load_config(write(tmp_path, cp=2), chunks)  # against one process that does not stream
    reports = run_doctors(
        [
            (streamed, None),
            (streamed, "tests.support.plants:lost_halo_gradient"),
            (context, None),
            (stages, None),
            (context, "tests.support.plants:norms_not_summed"),
            (context, "tests.support.plants:norms_wrong_group"),
            (context, "tests.support.plants:local_heads"),
            (context, "tests.support.plants:shifted_halo"),
            (stages, "tests.support.plants:wrap_leak"),
            (context, "tests.support.plants:thawed_frozen_weight"),
        ],
        processes=4,
        timeout_s=240,
    )
    assert reports[0].passed and reports[0].shrunk.config.train.stream == 18, failed(reports[0])
    assert "worst gradient, step 1" in failed(reports[1]) and "loss, step 1" not in failed(reports[1])
    right, tied, unsummed, norms, heads, halo, wrap, frozen = reports[2:]
    assert not failed(right) and right.passed and len(right.rows) == 14
    assert not failed(tied) and tied.shrunk.model["tie_word_embeddings"]

    for report in (unsummed, norms):
        assert {"worst gradient, step 1", "copies in sync after 3 steps"} <= failed(report)
        assert "loss, step 1" not in failed(report), "the forward pass is right"
        worst = next(row for row in report.rows if row.name == "worst gradient, step 1")
        assert "norm.weight" in worst.value and "group" in worst.hint

    assert {"loss, step 1", "token losses, grid against one process"} <= failed(heads)
    assert {"loss, step 1", "token losses, grid against one process"} <= failed(halo)
    # Neither is a leak of the future, nor lets ranks drift apart.
    probe = "one-token probe: earlier losses move by"
    for report in (heads, halo):
        assert not failed(report) & {probe, "copies in sync after 3 steps", "frozen weights unchanged"}

    # One process has it too, so nothing but the probe can see it.
    assert failed(wrap) == {probe}
    assert " reaches token " in next(row.value for row in wrap.rows if row.name == probe)
    assert "frozen weights unchanged" in failed(frozen)
    assert "rank 3" in next(row.value for row in frozen.rows if row.name == "frozen weights unchanged")

    told = io.StringIO()
    show(norms, Console(file=told, width=140), 1.0)
    assert "FAIL" in told.getvalue() and "look at which group" in told.getvalue() and "lora.dropout" in told.getvalue()


@pytest.mark.started
def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write(tmp_path))
    assert main(["--config", config, "--set", "attention.kind=full", "--processes", "1"]) == 0
    assert "against one process" in capsys.readouterr().out
    assert main(["--config", config, "--set", "attention.kinds=full"]) == 2
    assert "did you mean attention.kind" in capsys.readouterr().err
    assert main(["--config", config, "--set", "parallel.tp=3"]) == 2
    assert "does not divide" in capsys.readouterr().err


def test_engine_zero3_is_examined_as_it_is(tmp_path: Path) -> None:
    away = ["parallel.engine=zero3", "parallel.offload.params=cpu", "parallel.offload.optimizer=cpu"]
    with socket.socket() as other:
        # Of a job on this machine, at the port that torchrun and srun use unless told otherwise.
        with contextlib.suppress(OSError):
            other.bind(("127.0.0.1", 29500))
            other.listen()
        report = run_doctor(load_config(write(tmp_path, cp=2), away), 4, timeout_s=240)
    grid = report.shrunk.config.parallel
    assert (grid.engine, grid.offload.params, grid.offload.optimizer, grid.cp) == ("zero3", "cpu", "cpu", 2)
    assert report.passed and len(report.rows) == 14


def test_a_hang_ends_in_time_and_is_told(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    with pytest.raises(RankFailed, match=r"ranks \[0\] still ran after 0.1 s"):
        run_doctor(config, 1, timeout_s=0.1)


def shrunk(tmp_path: Path, processes: int | None = None, **axes: int) -> tuple[RunConfig, int]:
    config = load_config(write(tmp_path))
    config = replace(config, parallel=replace(config.parallel, **axes))
    found = shrink(config, tmp_path / "tiny", processes)
    return found.config, found.processes


def test_shrinking_keeps_axes_and_makes_nothing_fit_smoothly(tmp_path: Path) -> None:
    for axes in ({"tp": 2}, {"cp": 4}, {"tp": 2, "cp": 2}, {"pp": 4}, {"cp": 8}, {"pp": 2, "virtual": 2}, {"tp": 8}):
        config, processes = shrunk(tmp_path, **axes)
        grid = config.parallel
        assert {axis: getattr(grid, axis) for axis in axes} == axes
        size = grid.tp * grid.cp * grid.pp
        assert processes == (2 * size if 2 * size <= 8 else size)
        assert VOCAB % grid.tp or grid.tp == 1
        if grid.tp * grid.cp > 1:
            assert config.sequence % (grid.tp * grid.cp)
        shard = -(-config.sequence // (grid.tp * grid.cp)) * grid.tp
        if grid.cp > 1:
            assert shard % (config.group // 2), "both kinds of heads need a halo"
        assert 0.2 < config.group / config.sequence < 0.4 or grid.cp > 1


def test_groups_of_any_share_and_none_shrink(tmp_path: Path) -> None:
    for cp in (1, 2, 3, 4, 8):
        path = write(tmp_path, cp=cp)
        # A group longer than its sequence is refused where it is written; none may come of shrinking.
        for group, sequence in ((2, 64), (48, 64), (62, 64), (64, 64), (4, 3), (64, 63)):
            lengths = [f"attention.group_size={group}", f"data.sequence={sequence}"]
            tiny = shrink(load_config(path, lengths), tmp_path, processes=cp).config
            assert tiny.group <= tiny.sequence + 1
    full = shrink(load_config(write(tmp_path), ["attention.kind=full"]), tmp_path).config
    assert full.attention.kind == "full" and full.attention.group_size is None


def test_a_grid_too_large_is_cut_down_and_told(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, tp=8, cp=8))
    found = shrink(config, tmp_path)
    assert (found.config.parallel.tp, found.config.parallel.cp, found.processes) == (2, 4, 8)
    assert any(note.startswith("tp 8 is run as tp 2") for note in found.notes)
    with pytest.raises(ConfigError, match="cannot hold"):
        shrunk(tmp_path, 4, tp=2, cp=2, pp=2)
    with pytest.raises(ConfigError, match="multiple of tp x cp x pp = 4"):
        shrunk(tmp_path, 6, tp=2, cp=2)


def test_every_shipped_configuration_shrinks(tmp_path: Path) -> None:
    paths = sorted((ROOT / "launch/configs").glob("*.yaml"))
    assert len(paths) > 5
    for path in paths:
        found = shrink(load_config(path), tmp_path)
        grid = found.config.parallel
        plan_stages(found.model["num_hidden_layers"], grid.pp, grid.virtual)
        assert found.model["num_attention_heads"] % found.model["num_key_value_heads"] == 0
