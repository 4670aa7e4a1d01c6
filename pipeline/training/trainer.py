"""The step loop, and nothing else: what it works with is composed in `build`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from parallel.errors import CheckpointError
from parallel.health.signals import StopSignals
from parallel.health.watch import Watch
from parallel.world.collectives import share_from_main, sum_over
from parallel.world.groups import Groups
from parallel.world.rng import rng_state, set_rng_state
from pipeline.checkpoint.choose import set_aside
from pipeline.checkpoint.compatibility import DataStart, data_cursor
from pipeline.checkpoint.saver import CheckpointSaver
from pipeline.config.run import RunConfig
from pipeline.data.loader import TrainLoader
from pipeline.data.packing import IGNORE
from pipeline.model.rank_model import RankModel
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.reporting.metrics import MetricsWriter, peak_memory_gib
from pipeline.reporting.phases import StepClock
from pipeline.reporting.profile import StepProfile
from pipeline.reporting.progress import TrainProgress
from pipeline.reporting.versions import versions
from pipeline.training.invariants import RunChecks
from pipeline.training.non_finite import DivergenceGuard, TrainingDiverged
from pipeline.training.optimizer import TrainableAdamW
from pipeline.training.reduction import GradientReduction
from pipeline.training.schedule import learning_rate
from pipeline.training.spikes import SpikeWatch
from pipeline.training.state import own_pieces


@dataclass(frozen=True)
class TrainerParts:
    """Everything a trainer works with."""

    config: RunConfig
    groups: Groups
    model: RankModel
    optimizer: TrainableAdamW
    reduction: GradientReduction
    loader: TrainLoader
    guard: DivergenceGuard
    saver: CheckpointSaver
    spec: AttentionSpec
    """Training attention."""
    full_spec: AttentionSpec
    """Full attention, for the last `attention.full_last_steps` steps."""
    manifest: dict[str, Any]
    """What every checkpoint records of the run: config, layout, base hash, data fingerprint."""
    checks: RunChecks | None = None
    """Run-time invariants; None: `checks` is off."""
    spikes: SpikeWatch | None = None
    """Has a step far beyond the others computed again; None: `train.rerun_spikes` is off."""


class Stopped(Exception):
    """All ranks leave what they do unfinished, at the same micro-batch or window, since a signal asked for it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        """The signal."""


class Trainer:
    """Runs optimizer steps from `start` to the configured end."""

    def __init__(self, parts: TrainerParts, start: int) -> None:
        self.parts, self.step = parts, start
        self._sound = start if parts.guard.consecutive == 0 else 0
        """A checkpoint this process went on from is not put in doubt: whatever ails the next step came after it, and
        reruns that fail at once must not use up the older ones."""
        self._clock = StepClock(parts.groups.device)
        self._signals: StopSignals | None = None
        self._progress: TrainProgress | None = None
        self._rng = rng_state()
        """At the beginning of the step in progress: an abandoned one is done again."""

    def run(
        self,
        metrics: MetricsWriter | None,
        progress: TrainProgress,
        on_step: Callable[[int], None] = lambda step: None,
        stop_after: int | None = None,
        watch: Watch | None = None,
        figures: Callable[[int, float], Mapping[str, float]] | None = None,
        profile: StepProfile | None = None,
    ) -> int:
        """Train to the last step, saving as configured.

        Args:
            metrics: rank 0's writer, None elsewhere.
            progress: the live display.
            on_step: called after each optimizer step with the number of steps done (periodic evaluation); it may heed
                signals.
            stop_after: stop, saved, once so many steps are done; None: the configured end.
            watch: learns of every step begun, so that a rank that stands still is noticed.
            figures: more of a finished step (steps done, seconds) for its line of metrics.
            profile: records one of the steps.

        Returns:
            The signal that stopped it, 0 if none did; alike on all ranks, and so is the step saved.

        Raises:
            TrainingDiverged: too many bad steps in a row, or a loss that is too high at the end; says from which
                checkpoint a rerun goes on.
            CheckpointError: a checkpoint could not be written; of one written beside training, at the next step.
        """
        config, saver = self.parts.config, self.parts.saver
        end = self.end(stop_after)
        watch = watch or Watch()
        self._progress = progress
        while self.step < end:
            watch.progress(self.step + 1)
            self._rng = rng_state()
            try:
                self.heed()
                self._show(progress)
                with contextlib.nullcontext() if profile is None else profile.around(self.step + 1):
                    began = time.perf_counter()
                    row = self._one_step(self.step)
                    seconds = time.perf_counter() - began
            except Stopped as stop:
                self._save_and_leave(progress, watch)
                return stop.number
            except TrainingDiverged as error:
                raise self.diverged(error) from None
            self.step += 1
            if profile is not None and profile.recorded:
                with watch.patient("writing the profile"):  # which the other ranks wait for
                    profile.write()
            row |= {
                "step": self.step,
                "seconds": seconds,
                "tokens_per_second": row["tokens"] / seconds,
                "memory_gib": peak_memory_gib(),
            }
            if figures is not None:
                row |= figures(self.step, seconds)
            if metrics is not None:
                metrics.write(row)
            progress.update(self.step, row | {"saving": saver.progress})
            self._rng = rng_state()
            if self.step == config.train.steps:
                try:
                    self.parts.guard.check_end()
                except TrainingDiverged as error:
                    raise self.diverged(error) from None
            due = config.save.every and self.step % config.save.every == 0
            if due and self.step != end and (bad := self.parts.guard.consecutive):
                progress.say(f"step {self.step} is not saved: the last {bad} steps were not finite, or lost too much")
            elif self.step == end or due:
                with watch.patient("saving"):
                    self.save(wait=self.step == end)
                self._show(progress)
            try:
                on_step(self.step)
            except Stopped as stop:
                self._save_and_leave(progress, watch)
                return stop.number
        return 0

    def end(self, stop_after: int | None) -> int:
        """Steps done when `run` with this `stop_after` returns unstopped."""
        steps = self.parts.config.train.steps
        return steps if stop_after is None else min(steps, stop_after)

    def _save_and_leave(self, progress: TrainProgress, watch: Watch) -> None:
        with watch.patient("saving"):
            self.parts.saver.wait()
            if self.parts.saver.saved_step != self.step:
                self.save()
        self._show(progress)

    def diverged(self, error: TrainingDiverged) -> TrainingDiverged:
        """The error with what the run can go on from: checkpoints in doubt are renamed; collective.

        Raises:
            CheckpointError: an earlier save failed, or a checkpoint could not be renamed.
        """
        saver = self.parts.saver
        saver.wait()  # all ranks come here, and an earlier state may still be being written

        def mend() -> str:
            try:
                saver.still_ours()
                left, moved = set_aside(saver.folder, max(self._sound, self.parts.guard.last_sound_step))
            except OSError as refused:
                raise CheckpointError(
                    f"{error} {refused.filename}: could not be renamed ({refused.strerror}), though it was written "
                    "after training diverged; move it away before the rerun."
                ) from None
            renamed = f" Checkpoints in doubt were renamed: {', '.join(moved)}." if moved else ""
            if left is None:
                return f"{renamed} No earlier checkpoint is left, so a rerun starts over, and any setting may change."
            return (
                f"{renamed} A rerun goes on from step {left}; with resume.allow: [train.lr] (or [data.path]) it takes "
                "a changed setting."
            )

        return TrainingDiverged(f"{error}{share_from_main(self.parts.groups, mend)}")

    def save(self, wait: bool = True) -> None:
        """Save a checkpoint of the current step, with the random state it began with; collective.

        Args:
            wait: until it is whole; False: see `CheckpointSaver.settle`.
        """
        parts = self.parts
        if parts.checks is not None:
            parts.checks.before_save(self.step)
        parts.saver.start(
            self.step,
            own_pieces(parts.model, parts.config.train.trainable, parts.optimizer),
            self._rng,
            {
                **parts.manifest,
                "updates": parts.optimizer.updates,
                "cursor": data_cursor(self.step, parts.manifest["config"], DataStart.of(parts.manifest)),
                "guard": parts.guard.state_dict(),
                "versions": versions(),
                "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            },
            keep_all=parts.guard.consecutive > 0,
        )
        if wait:
            parts.saver.wait()

    @contextlib.contextmanager
    def listening(self, signals: StopSignals) -> Iterator[None]:
        """Within, a signal is a wish to stop: heeded between micro-batches (between steps under pipelining).

        Args:
            signals: entered by whoever made it, which may be for longer than this.
        """
        self._signals = signals
        try:
            yield
        finally:
            self._signals = None

    def heed(self) -> None:
        """Agree with the other ranks on the save under way and on stopping; collective.

        Raises:
            Stopped: a rank was sent a signal.
            CheckpointError: the save failed.
        """
        if number := self.parts.saver.settle(0 if self._signals is None else self._signals.number):
            raise Stopped(number)

    def _show(self, progress: TrainProgress) -> None:
        """Lines the saver has for the display."""
        for line in self.parts.saver.news:
            progress.say(line)
        self.parts.saver.news.clear()

    def _spec(self, step: int) -> AttentionSpec:
        return self.parts.full_spec if self.parts.config.in_full(step) else self.parts.spec

    def _one_step(self, step: int) -> dict[str, Any]:
        """One optimizer step; returns loss, norm, rates and token count."""
        row = self.gradients(step)
        if self.parts.spikes is not None:

            def again(each: torch.Tensor) -> dict[str, Any]:
                set_rng_state(self._rng)
                return self.gradients(step, each)

            row = self.parts.spikes.judge(step, row, again, self._say)
        self.update(step, row)
        return row

    def _say(self, sentence: str) -> None:
        if self._progress is not None:
            self._progress.say(sentence)

    def gradients(self, step: int, each: torch.Tensor | None = None) -> dict[str, Any]:
        """Forward and backward of optimizer step `step`, gradients summed over ranks into `main_grad`; collective.

        Args:
            step: 0-based.
            each: see `RankModel.train_step`.

        Returns:
            loss (mean over scored tokens, nats), grad_norm, tokens: alike on every rank; and this rank's seconds by
            phase (`reporting.phases.PHASES`).
        """
        parts, groups = self.parts, self.parts.groups
        began = time.perf_counter()
        batches = parts.loader.step(step)
        waited = time.perf_counter() - began
        # The loss is a mean over all scored tokens of the step, wherever they sit: the count is known before the first
        # forward, so that gradients need no correction and equal those of one process with one big batch.
        counts = torch.tensor(
            [sum(int((b.labels != IGNORE).sum()) for b in batches), sum(b.tokens.numel() for b in batches)],
            dtype=torch.int64,
            device=groups.device,
        )
        scored, tokens = (int(n) for n in sum_over(groups.replicas, counts))
        parts.model.train()
        parts.optimizer.zero_grad()
        self._clock.begin()
        total = parts.model.train_step(
            batches,
            self._spec(step),
            1 / max(scored, 1),
            before_last_backward=parts.optimizer.arm_reduce,
            between=self._pauses(step, parts.model.passes(batches)),
            each=each,
        )
        if parts.spikes is not None:
            parts.spikes.note(total)
        self._clock.mark("passes_s")
        parts.reduction.finish(parts.optimizer)
        self._clock.mark("sums_s")
        return {
            "loss": float(parts.reduction.total(total)) / max(scored, 1),
            "grad_norm": float(parts.optimizer.grad_norm(parts.reduction.squares)),
            "tokens": tokens,
            "data_s": waited,
            **self._clock.seconds(),  # by now the two figures above have waited for the GPU
        }

    def _pauses(self, step: int, passes: int) -> Callable[[], None]:
        """What is done between two of a step's passes over micro-batches or chunks."""
        done = 0

        def pause() -> None:
            nonlocal done
            done += 1
            self.heed()
            if self._progress is not None:
                self._progress.within(step + 1, done, passes)

        return pause

    def update(self, step: int, row: dict[str, Any]) -> None:
        """Clip and apply the gradients unless `row`'s figures are not finite; adds rates and skips to `row`."""
        parts, train = self.parts, self.parts.config.train
        rates = {
            "lora": self._rate(step, train.lr),
            "other": self._rate(step, train.lr_embed_norm or train.lr),
        }
        if parts.guard.check(row["loss"], row["grad_norm"]):
            parts.optimizer.step(rates, row["grad_norm"])
        if parts.checks is not None:
            parts.checks.after_step(step + 1)
        row |= {"lr": rates["lora"], "skipped": parts.guard.skipped}

    def _rate(self, step: int, peak: float) -> float:
        train = self.parts.config.train
        return learning_rate(step, peak, train.warmup_steps, train.steps, train.schedule, train.min_lr_ratio)
