"""SIGKILL at random instants of real ranks that save: the newest checkpoint that was whole is found, to the bit.

Kills fall before, while, between the files of, and after a save; on one rank, the other, or both. `SEED` (printed)
chooses victims and instants; what a given instant hits is up to the machine, so the places hit are counted and shown.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel.world.grid import plan_grid
from parallel.world.groups import destroy_groups, make_groups
from parallel.world.rank_env import RankEnv
from parallel.world.rng import rng_state
from pipeline import build, train
from pipeline.checkpoint.choose import candidates, choose
from pipeline.checkpoint.manifest import CHECKSUM, FIELDS, LATEST, MANIFEST, WRITING, Cut, folder_name, step_of
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.saver import CheckpointSaver, StatePiece
from pipeline.checkpoint.writer import clear_unfinished
from pipeline.evaluation import evaluator
from pipeline.training import run_record
from tests.integration.kill_zygote import END_S, START_S, WORLD, Board, Pair, victims_of
from tests.numerics.test_training import losses, rows, write_run
from tests.support.ranks import run_ranks

HEAVY = (build, evaluator, run_record)
"""Imported here so that the forked trainers need not."""
SEED = int(os.environ.get("LONGSPAN_KILL_SEED", "0"))
SAVER_KILLS, TRAINER_KILLS = 120, 12
STARTED, PUBLISHED = 0, 1
"""Places on the board: the newest step whose save rank 0 began, and whose it knows to be published."""

ROWS, COLUMNS = 384, 512
SHAPES: dict[str, tuple[int, ...]] = {"embed": (ROWS, COLUMNS), "lora_A": (8, COLUMNS), "norm": (COLUMNS,)}
CUTS: dict[str, list[Cut]] = {
    "embed": [(0, 0, ROWS // 2), (0, ROWS // 2, ROWS)],
    "lora_A": [(1, 0, 128), (1, 128, COLUMNS)],
    "norm": [None, None],
}
"""Of each rank: rows, columns, and two halves of one flat range."""


def state_at(step: int) -> dict[str, dict[str, np.ndarray]]:
    """Name -> field -> whole tensor; another one at every step."""
    rng = np.random.default_rng(step)
    return {name: {field: rng.random(shape, np.float32) for field in FIELDS} for name, shape in SHAPES.items()}


def pieces_at(step: int, rank: int) -> list[StatePiece]:
    """What a rank keeps of it."""
    found = []
    for name, fields in state_at(step).items():
        cut = CUTS[name][rank]
        blocks = {}
        for field, whole in fields.items():
            block = whole if cut is None else whole.take(range(cut[1], cut[2]), axis=cut[0])
            blocks[field] = torch.from_numpy(np.ascontiguousarray(block).reshape(-1))
        size = blocks[FIELDS[0]].numel()
        start, stop = (0, size) if cut is not None else (rank * size // WORLD, (rank + 1) * size // WORLD)
        state = {field: block[start:stop] for field, block in blocks.items()}
        found.append(StatePiece(name, SHAPES[name], cut, start, stop, state))
    return found


def same_state(folder: Path, step: int) -> bool:
    """Whether a checkpoint has the state of `step`, to the bit, and both ranks' random state."""
    with CheckpointReader(folder) as reader:
        return all(reader.rng(rank) for rank in range(WORLD)) and all(
            np.array_equal(reader.whole(name, field), whole)
            for name, fields in state_at(step).items()
            for field, whole in fields.items()
        )


def save_for_ever(rank: int, folder: Path, board: Board, steps: int) -> int:
    """A rank that saves its state at every step, from the newest whole checkpoint on."""
    groups = make_groups(plan_grid(WORLD, 1, 1, 1), RankEnv.read())
    choice = choose(folder)
    step = 0 if choice is None else choice.step
    groups.barrier()  # both have looked
    if rank == 0:
        clear_unfinished(folder)
    groups.barrier()
    saver = CheckpointSaver(folder, groups, keep=2)
    saver.prepare(pieces_at(step, rank))
    for now in range(step + 1, steps + 1):
        live = pieces_at(now, rank)
        if rank == 0:
            board[STARTED] = now
        saver.start(now, live, rng_state(), {"updates": now, "config": {}, "layout": {"dp": WORLD}})
        for piece in live:  # training goes on and changes what was copied
            for tensor in piece.state.values():
                tensor.zero_()
        while saver.progress is not None:
            saver.settle()
            time.sleep(0.001)
        saver.settle()
        if rank == 0:
            board[PUBLISHED] = now
    saver.close()
    destroy_groups()
    return 0


def place_of(folder: Path, started: int, victims: tuple[int, ...]) -> str:
    """What the kill hit, from what the victims left on the disk; a survivor may have written on."""
    old = any(path.name.startswith(f"{WRITING}old-") for path in folder.iterdir())
    working = folder / f"{WRITING}step-{started:06d}"
    found = candidates(folder)
    if not working.exists():
        if not found or step_of(found[0].name) != started:
            return "before its folder"
        latest = (folder / LATEST).read_text().strip() if (folder / LATEST).exists() else ""
        if latest != found[0].name:
            return "renamed, but not in latest"
        return "while an old one was removed" if old else "after it"
    if (working / MANIFEST).exists() and 0 in victims:
        return "all there, not renamed" if (working / CHECKSUM).exists() else "in the manifest"
    suffixes = tuple(f"-{rank:05d}{kind}" for rank in victims for kind in (".safetensors", ".json"))
    sizes = {path.name: path.stat().st_size for path in working.iterdir() if path.name.endswith(suffixes)}
    if sum(name.startswith("part-") for name in sizes) == len(victims):
        return "after its files"
    if not found:
        return "among its files"
    with CheckpointReader(found[0]) as reader:
        whole = reader.manifest.files
    cut = any(name in whole and size != whole[name].bytes for name, size in sizes.items())
    return "within a file" if cut else "between files" if sizes else "before its files"


def check(folder: Path, started: int, published: int) -> int:
    """The step to go on from: the newest that bears a whole one's name, right to the bit, and nothing else is."""
    choice = choose(folder)
    found = [path.name for path in candidates(folder)]
    if choice is None:
        assert not found and published == 0, (found, published)
        return 0
    assert choice.step in (published, started) and choice.folder.name == found[0], (choice, found, started, published)
    assert choice.step >= published, "a published checkpoint was lost"
    assert not any(str(folder / name) in warning for name in found for warning in choice.warnings), choice.warnings
    assert all(same_state(path, step_of(path.name) or 0) for path in candidates(folder))
    for path in folder.iterdir():
        if path.name.startswith(f"{WRITING}step-"):
            assert any(w.startswith(f"{path}: ") and w.endswith("ignored.") for w in choice.warnings), choice.warnings
            # The other rank may have begun the next one before rank 0 said so.
            earlier = path.name not in (f"{WRITING}step-{step:06d}" for step in (started, started + 1))
            assert not earlier, f"{path.name}: what an earlier kill left had been removed"
    return choice.step


def _savers(rank: int, world: int, folder: str, kills: int, seed: int) -> dict[str, Any]:
    """Kill pairs of savers, again and again."""
    dice, places, resumed = random.Random(seed), collections.Counter[str](), collections.Counter[str]()
    checkpoints, log = Path(folder) / "checkpoints", Path(folder) / "savers.log"
    checkpoints.mkdir()
    began, hit, step, periods = time.monotonic(), 0, 0, [0.05]
    while hit < kills:
        victims, board = victims_of(dice), Board(2)
        board[STARTED] = board[PUBLISHED] = step
        with Pair(lambda rank, board=board: save_for_ever(rank, checkpoints, board, 1 << 20), log) as pair:
            # The first save of a pair is left to measure how long one takes.
            assert pair.until(lambda board=board, first=step + 1: board[STARTED] >= first, START_S), tail(log)
            start = time.monotonic()
            assert pair.until(lambda board=board, first=step + 1: board[STARTED] > first, START_S), tail(log)
            periods.append(time.monotonic() - start)
            share = dice.uniform(0.0, 1.1)
            time.sleep(share * sorted(periods)[len(periods) // 2])
            assert pair.poll(), tail(log)
            pair.kill(victims)
            codes = pair.wait(END_S)
            hit += len(victims)
        assert all(codes[victim] == -9 for victim in victims) and all(codes.values()), codes
        started, published = board[STARTED], board[PUBLISHED]
        try:
            step = check(checkpoints, started, published)
        except Exception as error:
            raise AssertionError(f"seed {seed}, kill {hit} of ranks {victims} at {share:.3f} of a save") from error
        places[place_of(checkpoints, started, victims)] += 1
        resumed["the step being saved" if step == started else "the one before"] += 1
    with Pair(lambda rank: save_for_ever(rank, checkpoints, Board(2), step + 1), log) as pair:
        assert pair.wait(START_S) == {0: 0, 1: 0}, tail(log)
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == [LATEST, f"step-{step:06d}", f"step-{step + 1:06d}"], names
    assert same_state(checkpoints / names[-1], step + 1)
    return {
        "kills": hit,
        "pairs": sum(places.values()),
        "places": dict(places),
        "resumed": dict(resumed),
        "seconds": round(time.monotonic() - began, 1),
    }


def tail(log: Path) -> str:
    return log.read_text()[-3000:]


def kill_many(harness: Callable[..., dict[str, Any]], folder: Path, kills: int) -> dict[str, Any]:
    """Run a harness in a process of its own, and tell what it found."""
    print(f"\nLONGSPAN_KILL_SEED={SEED}")
    found = run_ranks(harness, 1, str(folder), kills, SEED, timeout=800)[0]
    print(f"\n{harness.__name__}, seed {SEED}: {json.dumps(found)}")
    assert found["kills"] >= kills
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_savers_killed_at_random_instants(tmp_path: Path) -> None:
    found = kill_many(_savers, tmp_path, SAVER_KILLS)
    assert len(found["places"]) >= 4
    assert len(found["resumed"]) == 2


def digest_of(folder: Path) -> str:
    """Of everything a checkpoint restores: masters, moments, random state."""
    digest = hashlib.sha256()
    with CheckpointReader(folder) as reader:
        for name in sorted(reader.manifest.tensors):
            for field in FIELDS:
                digest.update(reader.whole(name, field).tobytes())
        for rank in range(WORLD):
            for key, value in sorted((reader.rng(rank) or {}).items()):
                digest.update(key.encode() + value.tobytes())
    return digest.hexdigest()


def _trainers(rank: int, world: int, folder: str, kills: int, seed: int) -> dict[str, Any]:
    """Kill the trainer, again and again; every start but the first resumes what the kill before it left."""
    dice, root, began = random.Random(seed), Path(folder), time.monotonic()
    run, log = root / "run", root / "trainers.log"
    metrics, checkpoints = run / "metrics.jsonl", run / "checkpoints"
    paths = {name: write_run(root, name) for name in ("run", "undisturbed")}

    def trainer(name: str, steps: int, keep: int) -> Callable[[int], int]:
        settings = [f"train.steps={steps}", "save.every=1", f"save.keep={keep}", "parallel.cp=2"]
        words = [word for setting in settings for word in ("--set", setting)]
        return lambda rank: train.main(["--config", str(paths[name]), *words])

    def count() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def inode() -> int:
        return metrics.stat().st_ino if metrics.exists() else 0

    digests: dict[int, str] = {}
    hit, pairs, resumes, step, behind = 0, 0, 0, 0, collections.Counter[str]()
    while hit < kills:
        victims, steps, share = victims_of(dice), dice.choice([1, 2, 3]), dice.uniform(0.0, 1.5)
        before, target = inode(), step + steps
        with Pair(trainer("run", 5000, 2), log) as pair:
            # A resumed run writes the file anew, without the lines behind its checkpoint.
            assert pair.until(lambda before=before: inode() != before, START_S), tail(log)
            assert pair.until(lambda target=target: count() >= target, START_S), tail(log)
            time.sleep(share * rows(run)[-1]["seconds"])
            assert pair.poll(), tail(log)
            pair.kill(victims)
            codes = pair.wait(END_S)
        hit, pairs = hit + len(victims), pairs + 1
        where = f"seed {seed}, kill {hit} of ranks {victims} at {share:.3f} of a step"
        assert all(codes[victim] == -9 for victim in victims) and all(codes.values()), (where, codes)
        choice, done = choose(checkpoints), count()
        # Save n waits for the one before it, and a line stands before its step is saved.
        step = 0 if choice is None else choice.step
        assert max(done - 2, 0) <= step <= done, (where, step, done)
        if choice is not None:
            assert choice.folder == candidates(checkpoints)[0], (where, choice)
            digests[step] = digest_of(choice.folder)
            resumes += 1
        behind[f"{done - step} behind the last step"] += 1
    for name in paths:
        with Pair(trainer(name, step + 2, 1000), log) as pair:
            assert pair.wait(4 * START_S) == {0: 0, 1: 0}, tail(log)
    assert log.read_text().count("resumed at step ") == resumes
    assert losses(run) == losses(root / "undisturbed") and len(losses(run)) == step + 2
    for at, digest in digests.items():
        assert digest == digest_of(root / "undisturbed" / "checkpoints" / folder_name(at)), f"seed {seed}, step {at}"
    return {
        "kills": hit,
        "pairs": pairs,
        "resumed": dict(behind),
        "steps": step + 2,
        "seconds": round(time.monotonic() - began, 1),
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trainers_killed_at_random_instants(tmp_path: Path) -> None:
    """What they end with, and every checkpoint they went on from, is what a run has that nobody disturbed."""
    kill_many(_trainers, tmp_path, TRAINER_KILLS)
