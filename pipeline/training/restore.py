"""Going on from a checkpoint: which one, what it restores, and what may differ from the run that wrote it."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from parallel.errors import CheckpointError
from parallel.world.collectives import share_from_main
from parallel.world.groups import Groups
from parallel.world.rng import seed_everything, set_rng_state
from pipeline.checkpoint.choose import Choice, candidates, choose
from pipeline.checkpoint.compatibility import DataStart, check_cursor, check_resumable
from pipeline.checkpoint.manifest import step_of
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.writer import clear_unfinished
from pipeline.config.run import RunConfig
from pipeline.storage.durable import remove, rename
from pipeline.training.state import load_state
from pipeline.training.trainer import TrainerParts


def layout_of(config: RunConfig, groups: Groups) -> dict[str, int | str]:
    """What a checkpoint records of who wrote it; random state means something on the same layout only."""
    plan, parallel = groups.plan, config.parallel
    axes = {"tp": plan.tp, "cp": plan.cp, "pp": plan.pp, "dp": plan.dp, "virtual": parallel.virtual}
    return {"engine": parallel.engine, **axes, "device": groups.device.type}


def resume(parts: TrainerParts) -> Choice | None:
    """Restore the newest whole checkpoint, if any; collective. Damaged newer ones are set aside, under another name.

    Raises:
        CheckpointError: none is whole, or it holds something else.
        ConfigError: it was made under settings that compute something else.
    """
    groups, folder = parts.groups, parts.saver.folder

    def pick() -> str:
        choice = choose(folder)
        kept = clear_unfinished(folder)
        if choice is None:
            return ""
        for path in candidates(folder):
            if (step_of(path.name) or 0) > choice.step:
                aside = path.with_name(f"damaged-{path.name}")
                try:
                    remove(aside)
                    rename(path, aside)
                except OSError as error:
                    raise CheckpointError(
                        f"{path}: is damaged and could not be renamed to {aside.name} ({error.strerror or error}); "
                        "move it away, and rerun."
                    ) from None
        return json.dumps([choice.folder.name, choice.step, choice.reason, [*choice.warnings, *kept]])

    picked = share_from_main(groups, pick)
    if not picked:
        return None
    name, step, reason, warnings = json.loads(picked)
    with CheckpointReader(folder / name) as reader:
        manifest = reader.manifest
        changes = check_resumable(manifest.raw, parts.manifest)
        check_cursor(manifest)
        where = DataStart.of(manifest.raw).after(manifest.raw, step, changes)
        parts.loader.begin_at(where.step, where.read)
        parts.manifest["data_start"] = asdict(where)
        parts.manifest["changes"] = [*manifest.raw.get("changes", ()), *(change.at(step) for change in changes)]
        parts.manifest["init_from"] = manifest.raw.get("init_from")
        if parts.manifest["chat"] is None:
            parts.manifest["chat"] = manifest.raw.get("chat")
        warnings += [change.sentence(step) for change in changes]
        load_state(parts.model, parts.config.train.trainable, parts.optimizer, reader)
        parts.guard.load_state_dict(manifest.raw["guard"])
        layout, here = manifest.layout, parts.manifest["layout"]
        same = layout is not None and {"device": here["device"], **layout} == here
        same = same and "train.seed" not in {change.setting for change in changes}
        rng = reader.rng(groups.env.rank) if same else None
        if rng is not None and ("cuda" in rng) != (here["device"] == "cuda"):
            rng = None  # written before the device was recorded, on another one
    if rng is not None:
        set_rng_state({key: torch.from_numpy(value) for key, value in rng.items()})
    else:
        # Another layout draws other dropout masks anyhow; they must not be those of the first steps once more.
        seed_everything((parts.config.train.seed + 1_000_003 * step) % 2**31, groups.env.rank // groups.plan.tp)
    parts.saver.saved_step = step
    return Choice(folder / name, step, reason, tuple(warnings))
