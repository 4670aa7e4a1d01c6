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
from pipeline.config.yaml_file import dump_config, load_config
from pipeline.planning.run_plan import plan_run
from pipeline.reporting.command import command

if TYPE_CHECKING:  # it imports torch
    from parallel.health.watch import Watch


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line of the trainer."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.train", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=user_path, required=True, help="YAML of the run")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting; repeatable")
    parser.add_argument(
        "--stop-after", type=int, metavar="N", help="stop (saved) after N optimizer steps, to resume later"
    )
    args = parser.parse_args(argv)
    if args.stop_after is not None and args.stop_after < 1:
        parser.error(f"--stop-after: {args.stop_after} is no number of optimizer steps; give 1 or more.")
    return args


def train(config: RunConfig, env: RankEnv, stop_after: int | None = None, watch: Watch | None = None) -> int:
    """Compose and run; returns the exit code.

    Raises:
        LongspanError: one sentence for whatever a user can mend.
    """
    # Heavy imports wait until the configuration is known to be good.
    from parallel.health.signals import INTERRUPT_CODE, StopSignals, exit_code, stop_name
    from parallel.health.watch import Watch
    from parallel.world.groups import destroy_groups
    from pipeline.build import build
    from pipeline.data.overlap import shared_text
    from pipeline.evaluation.evaluator import Evaluator, forget_later
    from pipeline.reporting.lasting import optional_file
    from pipeline.reporting.metrics import MetricsWriter
    from pipeline.reporting.progress import TrainProgress
    from pipeline.training.lock import locked
    from pipeline.training.non_finite import TrainingDiverged
    from pipeline.training.run_record import record_run, starting_line, starting_warnings
    from pipeline.training.trainer import Stopped

    watch = watch or Watch()
    began = time.perf_counter()
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(destroy_groups)
        # Before groups are torn down: peers must hear the error, not see connections close.
        cleanup.push(watch.report)
        with watch.patient("waiting for the output folder's lock"):
            lock = cleanup.enter_context(locked(Path(config.output), env.is_main))
        with watch.patient("loading"):
            run = build(plan_run(config, env.world_size), env, watch=watch)
        cleanup.callback(run.trainer.parts.saver.close)
        cleanup.callback(run.trainer.parts.loader.close)
        cleanup.callback(run.trainer.parts.model.close)
        main, trainer = run.groups.is_main, run.trainer
        began_at = trainer.step
        if main:
            forget_later(run.output, began_at)
        if lock is not None:
            run.trainer.parts.saver.still_ours = lock.check
            with optional_file(run.output / "config.yaml"):
                (run.output / "config.yaml").write_text(dump_config(config))
        watch.line = run.groups.stage
        for stage in trainer.parts.model.stages:
            for layer in stage.decoder.layers:
                # Whatever schedule drives it, in evaluations and recomputations too. Layer by layer, it tells a rank
                # that hangs from one that runs ahead of it.
                layer.register_forward_pre_hook(lambda *_: watch.touch())
        evaluator, shared = None, ""
        if config.eval.path is not None:
            with watch.patient("reading the evaluation text"):
                evaluator = Evaluator(
                    run.plan, trainer.parts.model, run.groups, run.tokenizer, watch, before_round=trainer.heed
                )
                if main:
                    shared = shared_text(trainer.parts.loader.shards, evaluator.shards)
        progress = TrainProgress(config.train.steps, trainer.step, enabled=main)

        def warn(sentence: str) -> None:
            progress.say(f"warning: {sentence}")

        metrics = MetricsWriter(run.output, trainer.step, warn) if main else None

        def assess(label: str, step: int, *, shown: bool = True) -> None:
            if evaluator is None:
                return
            with watch.patient("evaluation"):
                report = evaluator.run(label, step, shown=shown)
            progress.say(f"perplexity, {label}: " + ", ".join(f"{n}: {p:.2f}" for n, p in report.perplexity.items()))
            if metrics is not None:
                metrics.write_perplexity(step, report.perplexity)
            if step:
                made_for = {r.length: r.nll for r in report.lengths if r.length <= config.model.context}
                try:
                    trainer.parts.guard.check_evaluation(made_for)
                except TrainingDiverged as error:
                    raise trainer.diverged(error) from None

        def make_up(label: str, step: int) -> None:
            """Evaluate what an earlier process did not come to, or was stopped in, after its step was saved."""
            if evaluator is not None and not evaluator.has(label, step):
                assess(label, step)

        def label_of(step: int) -> str:
            return f"step-{step:06d}"

        def due(step: int) -> bool:
            return bool(config.eval.every) and step % config.eval.every == 0 and 0 < step < config.train.steps

        def on_step(step: int) -> None:
            if due(step):
                assess(label_of(step), step, shown=False)

        told = run.resumed.warnings if run.resumed is not None else ()
        told += run.begun.warnings if run.begun is not None else ()
        data = (*run.warnings, *starting_warnings(run), *filter(None, [shared]))
        took_over = [lock.took_over] if lock is not None and lock.took_over else []
        for warning in (*config.warnings, *data, *run.plan.advice(), *took_over, *told):
            warn(warning)
        if main:
            record_run(run, shared=shared)
            progress.say(starting_line(run))
        end, stopped = trainer.end(stop_after), 0
        with StopSignals(speaks=main and not env.exit_file) as trainer.signals:
            try:
                if run.resumed is None:
                    if run.begun is not None:
                        progress.say(f"begins with the weights of {run.begun.folder} (step {run.begun.step})")
                    assess("untrained" if run.begun is None else "initial", 0)
                else:
                    progress.say(f"resumed at step {began_at} from {run.resumed.folder.name}: {run.resumed.reason}")
                    if due(began_at):
                        make_up(label_of(began_at), began_at)
                    if began_at >= end:
                        progress.say(f"nothing left to train: {began_at} steps of {end} are done")
                with progress:
                    stopped = trainer.run(metrics, progress, on_step, stop_after, watch)
                if stopped:
                    progress.say(
                        f"{stop_name(stopped)}: stopped and saved at step {trainer.step}; rerun the same command to go "
                        "on from there"
                    )
                elif trainer.step == config.train.steps:
                    make_up("after", trainer.step)
            except Stopped as stop:
                stopped = stop.number
                progress.say(
                    f"{stop_name(stopped)}: stopped in an evaluation; nothing trained is lost; rerun the same command "
                    "to evaluate again"
                )
        if metrics is not None:
            metrics.close()
        if main:
            record_run(run, time.perf_counter() - began, shared)
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
        return train(config, env, args.stop_after, watch)


if __name__ == "__main__":
    sys.exit(main())
