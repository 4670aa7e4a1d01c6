"""Train from one YAML: `python -m pipeline.train --config run.yaml`; the same command resumes.

Several processes: `python -m tools.torchrun --nproc-per-node N -m pipeline.train --config run.yaml`.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.errors import LongspanError
from parallel.world.rank_env import RankEnv
from pipeline.config.paths import user_path
from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import load_config
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser, whole_number

if TYPE_CHECKING:  # it imports torch
    from parallel.health.watch import Watch

PROFILED = 3
"""Step that --profile records: the first two load kernels and grow the allocator."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line of the trainer."""
    parser = Parser("pipeline.train", __doc__)
    parser.add_argument("--config", type=user_path, required=True, help="YAML of the run")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting; repeatable")
    parser.add_argument(
        "--stop-after", type=whole_number(), help="stop (saved) after N optimizer steps, to resume later"
    )
    parser.add_argument(
        "--profile",
        type=whole_number(),
        nargs="?",
        const=PROFILED,
        help=f"record the Nth step from here (default {PROFILED}): trace, memory and a page, in OUTPUT/profile",
    )
    return parser.parse_args(argv)


def train(
    config: RunConfig,
    env: RankEnv,
    stop_after: int | None = None,
    watch: Watch | None = None,
    profiled: int | None = None,
) -> int:
    """Compose and run; returns the exit code.

    Args:
        stop_after: stop, saved, after so many optimizer steps; None: at the end.
        watch: over all ranks; None: over none.
        profiled: which step from here to record; None: none.

    Raises:
        LongspanError: one sentence for whatever a user can mend.
    """
    # Heavy imports wait until the configuration is known to be good.
    from parallel.health.signals import INTERRUPT_CODE, exit_code
    from parallel.health.stacks import FOLDER, StackWriter
    from parallel.health.watch import Watch
    from parallel.world.groups import destroy_groups
    from pipeline.build import build
    from pipeline.data.overlap import shared_text
    from pipeline.evaluation.entry import open_evaluator
    from pipeline.evaluation.forget import forget_later
    from pipeline.reporting.profile import FOLDER as FOLDER_OF_PROFILES
    from pipeline.reporting.profile import StepProfile
    from pipeline.reporting.trackers import check_installed
    from pipeline.training.lock import locked
    from pipeline.training.planned import plan_here
    from pipeline.training.run_record import record_config
    from pipeline.training.session import Session, follow

    check_installed(config.report_to)
    watch = watch or Watch()
    began = time.perf_counter()
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(destroy_groups)
        # Before groups are torn down: peers must hear the error, not see connections close.
        cleanup.push(watch.report)
        with watch.patient("waiting for the output folder's lock"):
            lock = cleanup.enter_context(locked(Path(config.output), env.is_main))
        with watch.patient("loading"):
            planned = plan_here(config, env)
            cleanup.enter_context(planned.explaining_memory())
            plan, config = planned.plan, planned.plan.config
            if planned.chosen and env.is_main:
                print(planned.chosen, flush=True)
            run = build(plan, env, watch=watch, still_ours=None if lock is None else lock.check)
        watch.stacks = StackWriter(Path(config.output) / FOLDER, env.rank)
        parts = run.trainer.parts
        cleanup.callback(parts.saver.close)
        cleanup.callback(parts.loader.close)
        cleanup.callback(parts.model.close)
        if run.groups.is_main:
            forget_later(run.output, run.trainer.step)
            record_config(run)
            planned.record(run.output)
        follow(run, watch)
        evaluator, shared = None, ""
        if config.eval.path is not None:
            with watch.patient("reading the evaluation text"):
                evaluator = open_evaluator(
                    plan, parts.model, run.groups, run.tokenizer, watch, before_round=run.trainer.heed
                )
                if run.groups.is_main:
                    held_out = evaluator.shards
                    found = (shared_text(store, held_out) for store in parts.loader.dataset.stores)
                    shared = next(filter(None, found), "")
        took_over = "" if lock is None or lock.took_over is None else lock.took_over
        profile = None
        # Of the rank that all wait for too: what rank 0 waits for does not show why.
        if profiled is not None and env.rank in (0, plan.busiest_rank()):
            profile = StepProfile(run.output / FOLDER_OF_PROFILES, env.rank, profiled)
        session = Session(
            run,
            evaluator,
            watch,
            shared=shared,
            took_over=took_over,
            began=began,
            ideal=planned.ideal,
            profile=profile,
        )
        stopped = session.run(stop_after)
    if not stopped:
        return 0
    # A user's wish, not a scheduler's: a script that goes on after 0 must not.
    return exit_code(INTERRUPT_CODE if stopped == signal.SIGINT else config.save.signal_exit_code, env)


def _watch_ranks(env: RankEnv, *timeout_s: float) -> Watch:
    from parallel.health.watch import watch_ranks  # imports torch, for which a wrong configuration need not wait

    return watch_ranks(env, *timeout_s)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 (save.signal_exit_code after a scheduler's signal, 130 after Ctrl-C), or 2 with one sentence on
    standard error, of one rank."""
    args = parse(argv)
    env = RankEnv.read()
    try:
        config = load_config(args.config, args.set)
    except LongspanError:
        if env.world_size > 1:
            with _watch_ranks(env):  # the other ranks may have read a good file, and would wait
                raise
        raise
    with _watch_ranks(env, config.parallel.timeout_s) as watch:
        return train(config, env, args.stop_after, watch, args.profile)


if __name__ == "__main__":
    sys.exit(main())
