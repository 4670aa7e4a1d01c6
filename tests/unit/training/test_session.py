"""What a session does with what it is handed: the watch follows every layer, evaluations come where they are due."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel.health.signals import StopSignals
from parallel.health.watch import Watch
from pipeline.training import session
from pipeline.training.non_finite import TrainingDiverged
from pipeline.training.session import Session, follow
from pipeline.training.trainer import Stopped


class Told(Watch):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.line, self.touched, self.phases = -1, 0, list[str]()

    def set_line(self, line: int) -> None:
        self.line = line

    def touch(self) -> None:
        self.touched += 1

    @contextlib.contextmanager
    def patient(self, phase: str) -> Iterator[None]:
        self.phases.append(phase)
        yield


def test_the_watch_follows_every_layer_of_every_chunk() -> None:
    chunks = [torch.nn.Module() for _ in range(2)]
    for chunk in chunks:
        chunk.decoder = torch.nn.Module()
        chunk.decoder.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    parts = SimpleNamespace(model=SimpleNamespace(stages=chunks))
    run: Any = SimpleNamespace(groups=SimpleNamespace(stage=2), trainer=SimpleNamespace(parts=parts))
    watch = Told()
    follow(run, watch)
    assert watch.line == 2 and watch.touched == 0
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            layer(torch.zeros(1))
    assert watch.touched == 6


class Steps:
    """A trainer that takes `last` steps, unless `stop` is one of them."""

    def __init__(self, log: list[Any], first: int, last: int, stop: int | None) -> None:
        self.step, self._log, self._last, self._stop = first, log, last, stop
        self.parts = SimpleNamespace(guard=SimpleNamespace(check_evaluation=self._check))
        self.signals: StopSignals | None = None

    def _check(self, losses: dict[int, float]) -> None:
        if losses == {64: 9.0}:
            raise TrainingDiverged("too high.")

    def diverged(self, error: TrainingDiverged) -> TrainingDiverged:
        return TrainingDiverged(f"{error} Renamed.")

    def end(self, stop_after: int | None) -> int:
        return self._last

    @contextlib.contextmanager
    def listening(self, signals: StopSignals) -> Iterator[None]:
        self.signals = signals
        yield

    def run(
        self,
        metrics: None,
        progress: Any,
        on_step: Any,
        stop_after: int | None,
        watch: Watch,
        figures: Any,
        profile: object,
    ) -> int:
        # A step of 2 s that would have taken 0.5 s at the GPUs' rate.
        assert figures(self.step + 1, 2.0) == {"mfu": 0.25}
        while self.step < self._last:
            self.step += 1
            self._log.append(self.step)
            if self.step == self._stop:
                return 15
            on_step(self.step)
        return 0


class Evaluations:
    """An evaluator whose reports are there already for the labels in `made`, and that a signal stops in one label."""

    def __init__(self, log: list[Any], made: tuple[str, ...], nll: float, stopped_in: str = "") -> None:
        self._log, self._made, self._nll, self._stopped_in = log, made, nll, stopped_in

    def assess_base(self) -> None:
        self._log.append("base")

    def verdict(self) -> list[str]:
        return ["passkey is lost."]

    def assess(self, label: str, step: int, *, shown: bool = True, only: tuple[str, ...] | None = None) -> Any:
        if label == self._stopped_in:
            raise Stopped(15)
        self._log.append((label, shown) if only is None else (label, *only))
        # Beyond the run's context a loss is no measure of the run.
        lengths = [SimpleNamespace(length=64, nll=self._nll), SimpleNamespace(length=128, nll=99.0)]
        return SimpleNamespace(lengths=lengths, points={}, sentences=["perplexity, x: 2.00", "passkey, x: 0%"])

    def missing(self, label: str, step: int) -> tuple[str, ...]:
        return () if label in self._made else ("gap", "ruler")


def run_session(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    resumed_at: int | None = None,
    made: tuple[str, ...] = (),
    stop: int | None = None,
    stopped_in: str = "",
    nll: float = 1.0,
) -> tuple[int, list[Any], str, Told]:
    """Six steps, an evaluation every two; the outcome, what was done in order, what was printed."""
    monkeypatch.setattr(session, "record_run", lambda run, seconds=None, shared="": None)
    monkeypatch.setattr(session, "starting_line", lambda run: "starting")
    monkeypatch.setattr(session, "starting_warnings", lambda run: ["few windows"])
    monkeypatch.setattr(session, "MetricsWriter", lambda *_: None)
    log: list[Any] = []
    resumed = None
    if resumed_at is not None:
        resumed = SimpleNamespace(folder=Path("step-x"), reason="newest", warnings=("restored",))
    config = SimpleNamespace(
        train=SimpleNamespace(steps=6),
        eval=SimpleNamespace(every=2),
        model=SimpleNamespace(context=64),
        report_to=(),
        warnings=("asked",),
    )
    run: Any = SimpleNamespace(
        config=config,
        trainer=Steps(log, resumed_at or 0, 6, stop),
        groups=SimpleNamespace(is_main=True, env=SimpleNamespace(exit_file=None)),
        plan=SimpleNamespace(advice=lambda: ("uneven",)),
        output=Path("nowhere"),
        warnings=("passed over",),
        resumed=resumed,
        begun=None,
    )
    watch = Told()
    made_session = Session(
        run,
        Evaluations(log, made, nll, stopped_in),
        watch,
        shared="same text",
        took_over="taken",
        began=0.0,
        ideal=lambda step: 0.5,
    )
    return made_session.run(), log, capsys.readouterr().out, watch


def test_a_run_from_its_first_evaluation_to_its_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped, log, out, watch = run_session(monkeypatch, capsys)
    assert stopped == 0
    during = [1, 2, ("step-000002", False), 3, 4, ("step-000004", False), 5, 6]
    assert log == ["base", ("untrained", True), *during, ("after", "gap", "ruler")]
    assert out.count("passkey, x: 0%") == 4 and out.splitlines()[-1] == "verdict: passkey is lost.", "last, in words"
    warned = ["asked", "passed over", "few windows", "same text", "uneven", "taken"]
    assert [line.removeprefix("warning: ") for line in out.splitlines() if "warning" in line] == warned
    assert out.index("starting") > out.index("taken") and watch.phases == ["evaluation"] * 5


@pytest.mark.parametrize(
    ("at", "made", "expected"),
    [
        (4, (), [("step-000004", "gap", "ruler"), 5, 6, ("after", "gap", "ruler")]),
        (4, ("step-000004",), [5, 6, ("after", "gap", "ruler")]),
        (3, (), [4, ("step-000004", False), 5, 6, ("after", "gap", "ruler")]),
        (6, (), [("after", "gap", "ruler")]),
        (6, ("after",), []),
    ],
)
def test_a_resumed_run_makes_up_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: int,
    made: tuple[str, ...],
    expected: list[Any],
) -> None:
    stopped, log, out, _ = run_session(monkeypatch, capsys, resumed_at=at, made=made)
    assert (stopped, log) == (0, expected) and f"resumed at step {at} from step-x: newest" in out
    assert "warning: restored" in out and ("nothing left to train: 6 steps of 6" in out) == (at == 6)


def test_a_stopped_run_is_not_evaluated_at_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped, log, out, _ = run_session(monkeypatch, capsys, stop=3)
    assert stopped == 15 and log[-1] == 3 and "SIGTERM: stopped and saved at step 3; rerun" in out
    stopped, log, out, _ = run_session(monkeypatch, capsys, stopped_in="step-000002")
    assert stopped == 15 and log[-1] == 2 and "SIGTERM: stopped in an evaluation; nothing trained is lost" in out


def test_an_evaluation_that_shows_divergence_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainingDiverged, match=r"^too high\. Renamed\.$"):
        run_session(monkeypatch, capsys, nll=9.0)
