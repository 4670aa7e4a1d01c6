"""What one process does of a composed run: say what is about to happen, evaluate, train, stop in good order, record it.

`pipeline.train` composes the run and makes an exit code of the outcome. Evaluation stands above training, which must
not import it: the evaluator is handed in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from parallel.health.pace import PACE_EVERY, slow_ranks
from parallel.health.signals import StopSignals, stop_name
from parallel.health.watch import Watch
from pipeline.checkpoint.manifest import folder_name
from pipeline.config.yaml_file import config_dict
from pipeline.reporting.metrics import MetricsWriter
from pipeline.reporting.profile import StepProfile
from pipeline.reporting.progress import TrainProgress
from pipeline.reporting.trackers import Trackers
from pipeline.training.non_finite import TrainingDiverged
from pipeline.training.run_record import Run, record_run, starting_line, starting_warnings
from pipeline.training.trainer import Stopped


class LengthLoss(Protocol):
    """Mean loss at one context length."""

    @property
    def length(self) -> int:
        """Tokens."""

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, nats."""


class Report(Protocol):
    """One evaluation's outcome."""

    @property
    def lengths(self) -> Sequence[LengthLoss]:
        """One entry a context length."""

    @property
    def points(self) -> Mapping[str, float]:
        """Figures to plot, by name."""

    @property
    def sentences(self) -> Sequence[str]:
        """Lines for the display."""


class Assessor(Protocol):
    """What a session asks of an evaluator (`pipeline.evaluation.entry.open_evaluator`)."""

    def assess(self, label: str, step: int, *, shown: bool = True, only: Sequence[str] | None = None) -> Report:
        """Evaluate the model as it is, in all or in what is `missing`; collective."""

    def assess_base(self) -> None:
        """Measure the base, whose weights the model still has, if that is asked for; collective."""

    def verdict(self) -> Sequence[str]:
        """What the finished run lost, one sentence each."""

    def missing(self, label: str, step: int) -> Sequence[str]:
        """Which parts of this evaluation are not there, whole; collective."""


def follow(run: Run, watch: Watch) -> None:
    """Let the watch see how far this rank is.

    Layer by layer, whatever schedule drives them, in evaluations and recomputations too: that tells a rank that hangs
    from one that runs ahead of it.
    """
    watch.set_line(run.groups.stage)
    for stage in run.trainer.parts.model.stages:
        for layer in stage.decoder.layers:
            layer.register_forward_pre_hook(lambda *_: watch.touch())


class Session:
    """A process's part of a run, once it is composed.

    Args:
        run: from `pipeline.build.build`.
        evaluator: None: the run has no evaluation text.
        watch: learns that long work gets on.
        shared: what the evaluation text shares with the training text; empty: nothing was found.
        took_over: a sentence on the lock that another process left; empty: none did.
        began: `time.perf_counter()` when the process began with the run.
        ideal: seconds that a step would take if the GPUs did nothing but what its result needs, at the rate they are
            sold with (`planned.Planned.ideal`); None: not known.
        profile: records one of the steps.

    Raises:
        DataError: the metrics of an earlier session are damaged.
    """

    def __init__(
        self,
        run: Run,
        evaluator: Assessor | None,
        watch: Watch,
        *,
        shared: str = "",
        took_over: str = "",
        began: float,
        ideal: Callable[[int], float | None] = lambda step: None,
        profile: StepProfile | None = None,
    ) -> None:
        self._run, self._trainer, self._evaluator, self._watch = run, run.trainer, evaluator, watch
        self._shared, self._took_over, self._began = shared, took_over, began
        self._ideal, self._profile = ideal, profile
        self._main = run.groups.is_main
        self._progress = TrainProgress(run.config.train.steps, run.trainer.step, enabled=self._main)
        self._metrics = None
        if self._main:
            names = run.config.report_to
            trackers = Trackers(names, run.output, config_dict(run.config), self._warn) if names else None
            self._metrics = MetricsWriter(run.output, run.trainer.step, self._warn, trackers)

    def run(self, stop_after: int | None = None) -> int:
        """Everything up to the end, or to a stop; collective.

        Args:
            stop_after: stop, saved, once so many optimizer steps are done; None: the configured end.

        Returns:
            The signal that stopped it, 0 if none did; alike on all ranks.

        Raises:
            LongspanError: see `Trainer.run`, and what an evaluation finds.
        """
        self._introduce()
        stopped = self._work(stop_after)
        if self._metrics is not None:
            self._metrics.close()
        if self._main:
            record_run(self._run, time.perf_counter() - self._began, self._shared)
        return stopped

    def _introduce(self) -> None:
        """Warnings, then what is about to be trained."""
        run = self._run
        doubtful = (*run.warnings, *starting_warnings(run), self._shared)
        restored = () if run.resumed is None else run.resumed.warnings
        begun = () if run.begun is None else run.begun.warnings
        for warning in (*run.config.warnings, *doubtful, *run.plan.advice(), self._took_over, *restored, *begun):
            if warning:
                self._warn(warning)
        if self._main:
            record_run(run, shared=self._shared)
            self._say(starting_line(run))

    def _work(self, stop_after: int | None) -> int:
        """Evaluate, train, evaluate; returns the signal that stopped it."""
        trainer, stopped = self._trainer, 0
        env = self._run.groups.env
        with StopSignals(speaks=self._main and not env.exit_file) as signals, trainer.listening(signals):
            try:
                self._start(trainer.end(stop_after))
                with self._progress:
                    stopped = trainer.run(
                        self._metrics,
                        self._progress,
                        self._on_step,
                        stop_after,
                        self._watch,
                        self._figures,
                        self._profile,
                    )
                if stopped:
                    self._say(
                        f"{stop_name(stopped)}: stopped and saved at step {trainer.step}; rerun the same command to go "
                        "on from there"
                    )
                elif trainer.step == self._run.config.train.steps:
                    self._make_up("after", trainer.step)
                    if self._main and self._evaluator is not None:
                        for sentence in self._evaluator.verdict():
                            self._say(f"verdict: {sentence}")
            except Stopped as stop:
                stopped = stop.number
                self._say(
                    f"{stop_name(stopped)}: stopped in an evaluation; nothing trained is lost; rerun the same command "
                    "to evaluate again"
                )
        return stopped

    def _start(self, end: int) -> None:
        """Evaluate what there is before training, and say where it begins.

        Args:
            end: steps done when this session is.
        """
        run, step = self._run, self._trainer.step
        if run.resumed is None:
            if run.begun is not None:
                self._say(f"begins with the weights of {run.begun.folder} (step {run.begun.step})")
            elif self._evaluator is not None:
                with self._watch.patient("evaluation"):
                    self._evaluator.assess_base()
            self._assess("untrained" if run.begun is None else "initial", 0)
            return
        self._say(f"resumed at step {step} from {run.resumed.folder.name}: {run.resumed.reason}")
        if self._due(step):
            self._make_up(folder_name(step), step)
        if step >= end:
            steps = run.config.train.steps
            asked = f", and --stop-after says {end}" if end < steps else ""
            self._say(f"nothing left to train: {step} steps of {steps} are done{asked}")

    def _on_step(self, step: int) -> None:
        """An evaluation during training, and a look at the ranks' pace, where they are due."""
        if torch.cuda.is_available() and step % PACE_EVERY == 1:
            for sentence in slow_ranks(self._run.groups):
                self._warn(sentence)
        if self._due(step):
            self._assess(folder_name(step), step, shown=False)

    def _figures(self, step: int, seconds: float) -> Mapping[str, float]:
        """Model FLOP/s utilization, where the GPU's rate is known."""
        ideal = self._ideal(step)
        return {} if ideal is None else {"mfu": ideal / seconds}

    def _due(self, step: int) -> bool:
        config = self._run.config
        return bool(config.eval.every) and step % config.eval.every == 0 and 0 < step < config.train.steps

    def _assess(self, label: str, step: int, *, shown: bool = True, only: Sequence[str] | None = None) -> None:
        """Evaluate, all or what is missing, show and write it; a run that has diverged ends here."""
        if self._evaluator is None:
            return
        with self._watch.patient("evaluation"):
            report = self._evaluator.assess(label, step, shown=shown, only=only)
        for line in report.sentences:
            self._say(line)
        if self._metrics is not None:
            self._metrics.write_evaluation(step, report.points)
        if step:
            context = self._run.config.model.context
            made_for = {r.length: r.nll for r in report.lengths if r.length <= context}
            try:
                self._trainer.parts.guard.check_evaluation(made_for)
            except TrainingDiverged as error:
                raise self._trainer.diverged(error) from None

    def _make_up(self, label: str, step: int) -> None:
        """Evaluate what an earlier process did not come to, or was stopped in, after its step was saved."""
        if self._evaluator is not None and (missing := self._evaluator.missing(label, step)):
            self._assess(label, step, only=missing)

    def _say(self, sentence: str) -> None:
        self._progress.say(sentence)

    def _warn(self, sentence: str) -> None:
        self._say(f"warning: {sentence}")
