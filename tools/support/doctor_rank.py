"""One process of `tools.doctor`: `python -m tools.support.doctor_rank RANK WORLD JOBS.json`

Started by `local_ranks`. Rank 0 writes the tiny files and computes what one process gives, while the others still
load; then all of them run the grid, and rank 0 compares and writes the findings beside the jobs.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from parallel.errors import ConfigError, LongspanError
from parallel.health.replicas import InvariantViolated
from parallel.world.rank_env import RankEnv
from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import load_config
from pipeline.training.invariants import RunChecks, run_checks
from pipeline.training.run_record import Run
from tools.support.local_ranks import die_with_parent
from tools.support.parity import Difference, Observed, compare, observe
from tools.support.shrink import STEPS, TOKENS
from tools.support.tiny_checkpoint import write_files

PARITY = 1e-5
"""Relative, fp32 on CPU: sums in another order."""
PARITY_CUDA = 1e-4
"""On a GPU kernels differ by shape as well."""
UPDATED = 10
"""Times the limit allowed after updates: Adam divides by small moments, which enlarges rounding errors."""
UNSEEN = 1e-6
"""Nats by which an earlier token's loss may move when a later token changes: none, but for kernels on a GPU."""
SEEN = 1e-4
"""Nats by which some later loss must move, or the probe would see nothing."""

TOKENS_ROW = "token losses, grid against one process"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    value: str
    limit: str
    passed: bool
    hint: str = ""
    """Where to look if it fails."""


@dataclass
class Probed:
    """What one grid's probe saw; on every rank alike."""

    losses: torch.Tensor
    """Of one sequence's tokens under training attention, after the steps; fp32 [N - 1]."""
    leak: float
    """Largest change of a loss before the changed token, nats."""
    where: str
    seen: float
    """Smallest of each changed token's largest effect from there on, nats."""
    violations: dict[str, str]
    """Invariant -> what was wrong, empty: it held."""


def probe(run: Run) -> tuple[torch.Tensor, float, str, float]:
    """Change one token at a time; losses of earlier tokens must stay. Collective."""
    parts, config = run.trainer.parts, run.config
    sequence, half = config.sequence, parts.spec.group // 2
    shard = run.groups.plan.shard_tokens(sequence)
    chosen = {sequence - 1, sequence - half, sequence // 2, half, 2 * half, shard, shard + 1, 2}
    places = sorted(place for place in chosen if 2 <= place < sequence)
    tokens = torch.randint(3, TOKENS - 4, (sequence,), generator=torch.Generator().manual_seed(0))
    # Batches alike in shape and rows: then what does not change is equal to the bit.
    same = tokens.repeat(len(places), 1)
    changed = same.clone()
    for row, place in enumerate(places):
        changed[row, place] = 3 + (tokens[place] - 2) % (TOKENS - 7)
    parts.model.eval()
    before, after = (parts.model.token_nll(batch, parts.spec).cpu() for batch in (same, changed))
    parts.model.train()
    moved = (after - before).abs()
    leak, where, seen = 0.0, "", float("inf")
    for row, place in enumerate(places):
        # Entry i is the loss of token i + 1: changing a token first changes its own.
        early, late = moved[row, : place - 1], moved[row, place - 1 :]
        if early.numel() and not float(early.max()) <= leak:
            leak, where = float(early.max()), f"token {place} reaches token {int(early.argmax()) + 1}"
        seen = min(seen, float(late.max()))
    return before[0], leak, where, seen


def examine(config: RunConfig, env: RankEnv, keep_world: bool) -> tuple[Observed, Probed]:
    """Run one grid through `observe`, with invariants before and after and the probe at the end; collective."""
    checks: list[RunChecks] = []
    violations: dict[str, str] = {}
    probed: list[tuple[torch.Tensor, float, str, float]] = []

    def held(name: str, check: Callable[[], None]) -> None:
        try:
            check()
            violations.setdefault(name, "")
        except InvariantViolated as error:  # raised on every rank, so the others follow
            violations[name] = violations.get(name) or str(error)

    def before(run: Run) -> None:
        parts = run.trainer.parts
        checks.append(run_checks(run.groups, parts.model, parts.optimizer))
        held("copies in sync at the start", lambda: checks[0].check_replicas(0, everything=True))
        held("LoRA-B zero at step 0", checks[0].check_adapters_start_at_zero)

    def after(run: Run) -> None:
        held(f"copies in sync after {STEPS} steps", lambda: checks[0].check_replicas(STEPS))
        held("frozen weights unchanged", lambda: checks[0].check_frozen(STEPS))
        held("weights and moments finite", lambda: checks[0].check_finite(STEPS))
        probed.append(probe(run))

    found = observe(config, env, STEPS, keep_world, before, after)
    return found, Probed(*probed[0], violations)


def findings(
    found: tuple[Observed, Probed], reference: tuple[Observed, Probed], wraps: bool, limit: float
) -> list[Row]:
    """The table of one grid; `wraps`: the configuration asks for the leak of the published roll."""
    (mine, seen), (theirs, seen_alone) = found, reference
    first, later = compare(_first_step(mine), _first_step(theirs)), compare(mine, theirs)

    def parity(name: str, error: float, hint: str, note: str = "", loosely: bool = False) -> Row:
        most = limit * UPDATED if loosely else limit
        return Row(name, f"{error:.1e}{note}", f"{most:.0e}", error <= most, hint)

    def updated(name: str, error: float, note: str = "") -> Row:
        return parity(name, error, "the update: see gradients and copies", note, loosely=True)

    losses = float((seen.losses - seen_alone.losses).abs().max() / seen_alone.losses.abs().max())
    leak = max((seen.leak, seen.where), (seen_alone.leak, seen_alone.where + " (also in one process)"))
    rows = [
        parity("loss, step 1", first.loss, "the forward pass: attention, heads, halo, vocabulary"),
        parity("gradient norm, step 1", first.norm, "the backward pass, or which ranks a gradient is counted on"),
        parity(
            "worst gradient, step 1", first.gradient, "which group this tensor's gradient is summed over", _of(first)
        ),
        updated(f"losses to step {STEPS + 1}", later.loss),
        updated("worst gradient to the end", later.gradient, _of(later)),
        updated(f"weights after {STEPS} steps", later.trained),
        parity(TOKENS_ROW, losses, "attention without gradients, or the pipeline relay", loosely=True),
        Row(
            "one-token probe: earlier losses move by",
            f"{leak[0]:.1e}" + (f", {leak[1]}" if leak[0] > UNSEEN else ""),
            "a leak is asked for" if wraps else f"{UNSEEN:.0e}",
            wraps or leak[0] <= UNSEEN,
            "attention sees the future: a wrap, or a halo of later tokens",
        ),
        Row(
            "one-token probe: later losses move by",
            f"{min(seen.seen, seen_alone.seen):.1e}",
            f"over {SEEN:.0e}",
            min(seen.seen, seen_alone.seen) > SEEN,
            "the probe is blind: a token reaches nothing",
        ),
    ]
    for name, wrong in seen.violations.items():
        wrong = wrong or seen_alone.violations[name]
        if name == "frozen weights unchanged" and not (mine.frozen_kept and theirs.frozen_kept):
            wrong = wrong or "the frozen weights' hash changed on rank 0"
        rows.append(Row(name, wrong or "yes", "yes", not wrong, "pipeline.training.invariants says what must hold"))
    return rows


def _first_step(found: Observed) -> Observed:
    return replace(found, losses=found.losses[:1], norms=found.norms[:1], gradients_after=found.gradients)


def _of(difference: Difference) -> str:
    return f" {difference.worst.removeprefix('model.')}"


def load_plant(path: str | None) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """The context manager at `module:name`, which plants a fault while it is entered; None: none (tests only)."""
    if path is None:
        return contextlib.nullcontext
    module, _, name = path.partition(":")
    plant: Callable[[], contextlib.AbstractContextManager[None]] = getattr(importlib.import_module(module), name)
    return plant


def work(rank: int, world: int, jobs_file: Path) -> None:
    """Run all jobs of a file; rank 0 writes `findings.json` beside it."""
    if torch.cuda.is_available() and torch.cuda.device_count() < world:
        raise ConfigError(f"--device: {world} GPUs are needed and {torch.cuda.device_count()} are here; use cpu.")
    jobs = json.loads(jobs_file.read_text())
    ready = jobs_file.with_name("ready")
    references: dict[tuple[str, str | None], tuple[Observed, Probed]] = {}
    if rank == 0:
        for job in jobs:
            config = load_config(Path(job["config"]))
            if not Path(config.model.path).exists():
                write_files(config, job["model"])
            plant = load_plant(job["plant"])
            # A fault of code that one process runs as well shows only in the probe.
            key = (job["config"], job["plant"] if getattr(plant, "everywhere", False) else None)
            job["reference"] = key
            if key not in references:
                alone = replace(
                    config,
                    parallel=replace(config.parallel, tp=1, cp=1, pp=1, virtual=1),
                    train=replace(config.train, stream=None),
                )
                with load_plant(key[1])():
                    references[key] = examine(alone, RankEnv(), keep_world=False)
        ready.touch()
    while not ready.exists():
        time.sleep(0.05)
    tables = []
    # Where `local_ranks` says, not at the port of a job that may run here.
    env = RankEnv(rank, world, rank, launched=True, master_port=int(os.environ["MASTER_PORT"]))
    for job in jobs:
        config = load_config(Path(job["config"]))
        with load_plant(job["plant"])():
            found = examine(config, env, keep_world=True)
        if rank == 0:
            limit = PARITY_CUDA if torch.cuda.is_available() else PARITY
            rows = findings(found, references[job["reference"]], config.attention.legacy_wrap, limit)
            tables.append([asdict(row) for row in rows])
    if rank == 0:
        jobs_file.with_name("findings.json").write_text(json.dumps(tables))
    # Rank 0 hosts the store the others still talk to.
    torch.distributed.barrier(device_ids=[torch.cuda.current_device()] if torch.cuda.is_available() else None)


def main(argv: Sequence[str]) -> int:
    """0, or 2 with one sentence: what a user can mend."""
    die_with_parent()
    torch.set_num_threads(1)
    try:
        work(int(argv[0]), int(argv[1]), Path(argv[2]))
    except LongspanError as error:
        print(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
