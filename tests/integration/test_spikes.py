"""A step far beyond the others is computed again: bad data are named, and so is the rank whose hardware errs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from parallel.world.groups import destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline.config.yaml_file import load_config
from pipeline.data.sampler import step_indices
from pipeline.reporting.progress import TrainProgress
from pipeline.training.reduction import GradientReduction
from pipeline.training.run_record import Run
from pipeline.training.trainer import Trainer
from tests.support.ranks import run_ranks
from tests.support.runs import build_run
from tests.support.tiny_models import make_tiny, write_tokenizer

STEPS, AT, WINDOW, BATCH, WINDOWS = 18, 17, 32, 2, 60
"""The step that goes wrong is the AT-th, 1-based: the first one that can be judged."""
YAML = """
model: {{path: {base}, context: {window}, dtype: fp32}}
attention: {{kind: s2, group_size: 8}}
lora: {{rank: 4, dropout: 0.1}}
data: {{path: {text}}}
train: {{steps: {steps}, global_batch: {batch}, lr: 1.0e-2, warmup_steps: 0, seed: 7}}
save: {{every: 0}}
output: {output}
"""
GRIDS: list[dict[str, Any]] = [{}, {"tp": 2}, {"cp": 2}, {"pp": 2}, {"engine": "zero3"}]
Told = tuple[list[float], list[str]]
"""Losses, and what was said."""


def odd_window() -> int:
    """A window of step AT."""
    return int(step_indices(7, AT - 1, BATCH, WINDOWS)[1])


def write_run(folder: Path) -> str:
    """Text of one word, which is learned at once."""
    make_tiny(folder / "base", "llama2")
    write_tokenizer(folder / "base")
    (folder / "text").mkdir()
    (folder / "text/a.txt").write_text("w1a " * 20000)
    path = folder / "run.yaml"
    path.write_text(
        YAML.format(
            base=folder / "base", text=folder / "text", output=folder / "run", window=WINDOW, steps=STEPS, batch=BATCH
        )
    )
    return str(path)


@contextlib.contextmanager
def odd_data() -> Iterator[None]:
    """One window holds other tokens than all the rest."""
    from pipeline.data.packing import PackedDataset, Window

    honest, chosen = PackedDataset.window, odd_window()

    def window(self: PackedDataset, index: int, mask_documents: bool = False) -> Window:
        found = honest(self, index, mask_documents)
        if index == chosen:
            found.tokens[:] = (found.tokens * 0) + torch.arange(WINDOW).numpy() % 17 + 3
            found.labels[:] = found.tokens[::-1]
        return found

    with (
        mock.patch.object(PackedDataset, "window", window),
        mock.patch.object(PackedDataset, "__len__", lambda _: WINDOWS),
    ):
        yield


@contextlib.contextmanager
def few_windows() -> Iterator[None]:
    """The same windows as with odd data, and none of them odd."""
    from pipeline.data.packing import PackedDataset

    with mock.patch.object(PackedDataset, "__len__", lambda _: WINDOWS):
        yield


def wrong_gradient(trainer: Trainer) -> None:
    """In the backward of step AT, the first time: a gradient is far too large, as after a flipped bit."""
    model = trainer.parts.model
    *_, parameter = (p for name, p in model.canonical_parameters() if p.requires_grad and "layers" in name)
    left = [1]

    def strike(gradient: torch.Tensor) -> torch.Tensor:
        if trainer.step == AT - 1 and left:
            left.pop()
            return gradient * 1e8
        return gradient

    parameter.register_hook(strike)


def wrong_sum(trainer: Trainer) -> None:
    """After the sum over the ranks of step AT, the first time: this rank's copy of it is NaN."""
    reduction, honest, left = trainer.parts.reduction, GradientReduction.finish, [1]

    def finish(optimizer: Any) -> None:
        honest(reduction, optimizer)
        if trainer.step == AT - 1 and left:
            left.pop()
            optimizer._gradients.flat.fill_(float("nan"))

    trainer.parts.reduction.finish = finish  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[Trainer], None]] = {"gradient": wrong_gradient, "sum": wrong_sum}


def run_on(path: str, grid: dict[str, Any], fault: str = "", rank: int = 0, odd: bool = False, on: bool = True) -> Told:
    """Train to the end, with a fault in one rank."""
    env = RankEnv.read()
    output = f"{path}-{'-'.join(f'{k}{v}' for k, v in grid.items())}-{fault}{rank}-{odd}-{on}"
    words = [f"parallel.{axis}={size}" for axis, size in grid.items()]
    with odd_data() if odd else few_windows():
        run: Run = build_run(
            load_config(Path(path), [*words, f"output={output}", f"train.rerun_spikes={str(on).lower()}"]), env
        )
        try:
            trainer, said, losses = run.trainer, list[str](), list[float]()
            if fault and env.rank == rank:
                FAULTS[fault](trainer)
            made = mock.Mock(side_effect=trainer.parts.loader._make)
            trainer.parts.loader._make = made  # type: ignore[method-assign]
            progress = TrainProgress(STEPS, enabled=False)
            with (
                mock.patch.object(progress, "say", said.append),
                mock.patch.object(progress, "update", lambda _, row: losses.append(row["loss"])),
            ):
                assert trainer.run(None, progress) == 0
            assert (trainer.parts.spikes is not None) is on
            read = [call.args[0] for call in made.call_args_list]
            assert len(set(read)) == len(read) and set(range(STEPS)) <= set(read), "each step is read once"
            return losses, [line for line in said if "far beyond" in line or "not finite" in line]
        finally:
            run.trainer.parts.saver.close()
            run.trainer.parts.loader.close()
            run.trainer.parts.model.close()
            destroy_groups(keep_world=env.launched)


def test_bad_data_are_named_and_nothing_is_changed(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    losses, said = run_on(path, {}, odd=True)
    (line,) = said
    assert line.startswith(f"warning: step {AT}: loss ") and "far beyond the last 16 steps'" in line
    assert "it is the same on every rank, so none computes wrongly now" in line
    first = re.search(r"lost in window (\d+) \(document 0 of data.path\), ([\d.]+)", line)
    assert first is not None and int(first[1]) == odd_window() and float(first[2]) > 2 * losses[AT - 2]
    # With dropout: the random state is played again, and the step's own numbers stay.
    assert (losses, []) == run_on(path, {}, odd=True, on=False)
    assert run_on(path, {})[1] == [], "without it nothing is said"


@pytest.mark.gpu
def test_on_a_gpu_the_same_step_is_told_to_be_the_same(tmp_path: Path) -> None:
    """Where additions come in any order: see TOLERANCE."""
    (line,) = run_on(write_run(tmp_path), {}, odd=True)[1]
    assert f"Most was lost in window {odd_window()} (" in line


def test_a_fault_of_the_hardware_is_undone(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    losses, said = run_on(path, {}, "gradient")
    (line,) = said
    assert line.startswith(f"warning: step {AT}: gradient norm ") and "rank 0 on " in line
    assert "computed something else from the same state" in line and "the hardware is the cause" in line
    assert losses == run_on(path, {})[0], "as if nothing had been"
    assert run_on(path, {}, "gradient", on=False)[0] != losses


def _two_ranks(rank: int, world: int, path: str) -> list[tuple[Told, Told, Told, Told]]:
    found = []
    for grid in GRIDS:
        cases = run_on(path, grid), run_on(path, grid, odd=True)
        faults = run_on(path, grid, "gradient", rank=1), run_on(path, grid, "sum", rank=1)
        found.append((*cases, *faults))
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_decide_alike_and_name_the_one_that_errs(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    ranks = run_ranks(_two_ranks, 2, path, timeout=500)
    for grid, one, two in zip(GRIDS, *ranks, strict=True):
        straight, odd, gradient, summed = one
        for mine, other in zip(one, two, strict=True):
            assert mine[0] == other[0], (grid, "ranks went on with other losses")
        assert straight[1] == []
        assert re.search(rf"lost in window {odd_window()} \(", odd[1][0]), (grid, odd)
        assert odd[1] == two[1][1]
        (line,) = gradient[1]
        assert "computed something else" in line and "rank 1 on" in line, (grid, line)
        # Tensor-parallel ranks sum the gradients of what they share before anybody looks.
        assert ("rank 0 on" in line) == ("tp" in grid), (grid, line)
        assert gradient[0] == straight[0], grid
        assert len(summed[1]) == 1 and summed[0] == straight[0], (grid, summed)
