"""Ends the whole job, with one sentence that names the rank, the step and the cause, when a rank raises, dies or hangs.

Without it the survivors of a lost rank stand in a collective until its time-out and then print that, not the cause.

Every rank runs one watching thread with a connection of its own to the store the ranks met at (torch's default store
must not be shared: a blocked call of one thread blocks the other's). Twice a second the thread publishes this rank's
beat, reads the others' and judges (see `liveness`). The first verdict wins, one rank prints it, all leave with the same
exit code: by os._exit, since a main thread inside a collective cannot be interrupted.

    with watch_ranks(env, timeout_s) as watch:
        with watch.patient("loading"): ...
        for step in ...: watch.progress(step)
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import NoReturn, Self

from parallel.health.liveness import PATIENCE, SILENCE_S, Beat, Peers, machine, main_thread_stands
from parallel.health.signals import AT_ONCE, INTERRUPT_CODE, end_at_once, tell
from parallel.health.stacks import StackWriter, with_stacks
from parallel.health.verdict import Verdict, at_step, is_communication_error, verdict_of
from parallel.health.watch_store import STORE_S, StoreMinder, meet
from parallel.world.meeting import LOST
from parallel.world.rank_env import RankEnv

DEFAULT_TIMEOUT_S = 600.0
BEAT_S = 0.5
"""Seconds between beats, up to CROWD ranks; beyond, it grows with the ranks, all of which the store must serve."""
CROWD = 64
FAREWELL_S = 3.0
"""Seconds a rank waits for the verdict to be printed, and the store's host for the others to have heard it."""
SIGTERM_CODE = 128 + signal.SIGTERM
ENDING = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that end a rank at once while there is nothing to save."""


def collective_timeout_s(timeout_s: float) -> float:
    """Time-out of collectives under a watch: past every limit of the watch, so that its message comes first."""
    return timeout_s * PATIENCE + 60.0


class Watch:
    """Tells how the run gets on. This one has nobody to tell: a single process fails by itself."""

    stacks: StackWriter | None = None  # set as soon as the output folder is this run's

    def set_line(self, line: int) -> None:
        """This rank's pipeline stage: ranks of one line are expected to be equally far."""

    def progress(self, step: int, phase: str = "training") -> None:
        """The main thread got on to a step; call it as often as you like.

        Args:
            step: optimizer step in progress, counted from 1.
            phase: what a message calls it; `training` goes without saying.
        """

    def touch(self) -> None:
        """The main thread got on within its step or phase; call this or `progress` at least once in `timeout_s`."""

    @contextlib.contextmanager
    def patient(self, phase: str) -> Iterator[None]:
        """Within, standing still is no hang (for PATIENCE times the time-out), on this rank or on those it keeps
        waiting."""
        yield

    def report(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """An `__exit__` for `ExitStack.push`: ends the whole job if there is an error, else does nothing."""
        return False

    def close(self) -> None:
        """The run ended well."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.report(kind, error, trace)
        finally:
            self.close()


def watch_ranks(env: RankEnv, timeout_s: float = DEFAULT_TIMEOUT_S) -> Watch:
    """Start watching, before anything that could fail; from the main thread.

    Args:
        env: this process among its peers.
        timeout_s: seconds without progress on any rank that count as a hang.

    Raises:
        LongspanError: the ranks' meeting place cannot be reached.
    """
    return Watch() if env.world_size == 1 else RankWatch(env, timeout_s)


class RankWatch(Watch):
    """One of several ranks; see the module and `watch_ranks`."""

    def __init__(self, env: RankEnv, timeout_s: float) -> None:
        self._env, self._timeout_s = env, timeout_s
        self._hosting = env.rank == 0 and not env.agent_store
        self._interval = BEAT_S * max(1.0, env.world_size / CROWD)
        self._silence_s = max(SILENCE_S, 4 * self._interval)
        self._step, self._phase, self._patience, self._line = 0, "starting", 0, 0
        self._failure: Verdict | None = None
        self._secondary_since: float | None = None
        self._closing = False
        self._count = 0
        self._main = threading.get_ident()
        self._store = meet(env, timeout_s)
        self._moved = time.monotonic()
        self._moves = self._exchanges = self._interrupts = 0
        self._peers = Peers(env.rank, env.world_size, self._moved, machine())
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        # Python runs a handler only once its main thread returns from the collective it stands in; the byte in this
        # pipe arrives at once. It lets the thread say why the launcher ends everybody: it saw the dead rank first.
        self._old_fd = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._handler = lambda *_: None
        self._old_handlers = {number: signal.signal(number, self._handler) for number in ENDING}
        self._ended_by = 0
        self._publish(False)  # before anything can fail: whoever dies at once has been known
        self._minder = StoreMinder(lambda: self._exchanges, self._interval, self._store_silent)
        self._thread = threading.Thread(target=self._run, name="longspan-watch", daemon=True)
        self._thread.start()

    def set_line(self, line: int) -> None:
        """See `Watch`."""
        self._line = line

    def progress(self, step: int, phase: str = "training") -> None:
        """See `Watch`: four assignments."""
        self._step, self._phase, self._moved, self._moves = step, phase, time.monotonic(), 0

    def touch(self) -> None:
        """See `Watch`: two assignments."""
        self._moved = time.monotonic()
        self._moves += 1

    @contextlib.contextmanager
    def patient(self, phase: str) -> Iterator[None]:
        """See `Watch`."""
        before = self._phase
        self._patience += 1
        self.progress(self._step, phase)
        # Not in a `finally`: an error inside must be reported as of this phase.
        yield
        self._patience -= 1
        self.progress(self._step, before)

    def report(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """See `Watch`; does not return if there is an error."""
        if error is None:
            return False
        if is_communication_error(error):
            self._secondary_since = time.monotonic()
        place = at_step(self._step, self._phase)
        self._failure = verdict_of(error, trace, self._env.rank, place, self._secondary_since is not None)
        self._wake()
        # The thread ends the process. If it cannot (the store's machine vanished without a word), this does.
        self._thread.join(self._silence_s + 2 * STORE_S)
        self._print(self._failure)
        self._leave(self._failure.code)

    def close(self) -> None:
        """See `Watch`: takes leave in good order; the store's host leaves last."""
        self._closing = True
        self._wake()
        self._thread.join()
        self._minder.close()
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")

    def _run(self) -> None:
        """The thread."""
        try:
            while True:
                signaled, lost = self._sleep(self._interval), False
                closing = self._closing  # if only later, the beat that is published now may not say so yet
                # Another handler is the trainer's, which saves and leaves in good order, unless a peer is dead.
                terminated = bool(signaled) and signal.getsignal(signaled) is self._handler
                if terminated and not self._closing:
                    self._ended_by = signaled
                try:
                    verdict = self._exchange()
                    if signaled and verdict is None:
                        verdict = self._last_words(terminated)
                except LOST:
                    if self._closing:
                        return  # the host had nobody left to wait for
                    verdict, lost = None if terminated else self._without_store(), True
                    terminated = terminated or verdict is None
                if verdict is not None:
                    self._end(verdict, lost)
                if terminated:
                    self._leave(128 + signaled if signaled else SIGTERM_CODE)
                if closing and self._all_left():
                    return
        except Exception:  # a fault in here must not end a healthy run; collectives still have their time-out
            self._minder.over.set()
            traceback.print_exc()
            print(
                f"warning: rank {self._env.rank} is no longer watched, for the reason above; go on, and report it.",
                file=sys.stderr,
            )

    def _store_silent(self, silent_s: float) -> None:
        """The first thread's call has not returned for so long; in the second thread, every interval."""
        hosted = not self._env.agent_store and any(beat.rank == 0 for beat in self._peers.stopped())
        if silent_s > self._timeout_s and hosted:
            how = "it is stopped (SIGSTOP, or a debugger), and so is the store it hosts"
            place = at_step(self._step, self._phase)
            # This rank's own failure comes first, unless it is only what the silence did to it.
            if self._failure is None or self._secondary_since is not None:
                self._failure = Verdict(0, f"rank 0 hangs {place}: no progress for {silent_s:.0f} s; {how}")
            self._peers.wake_stopped()  # then the call returns, and the first thread proposes this
        elif silent_s > max(self._timeout_s, self._silence_s):
            self._end(self._without_store() or Verdict(0, "rank 0 left without a word"), lost=True)

    def _sleep(self, seconds: float) -> int:
        """Until something happens, at most `seconds`; which of ENDING it was, 0: none."""
        ready, _, _ = select.select([self._wake_read], [], [], seconds)
        came = os.read(self._wake_read, 4096) if ready else b""
        self._interrupts += came.count(signal.SIGINT)
        if self._interrupts > 1:
            time.sleep(BEAT_S)  # the main thread's handler says it, unless it stands in a collective
            if self._env.is_main and not self._env.exit_file:
                tell(AT_ONCE)
            self._leave(INTERRUPT_CODE)
        return next((number for number in ENDING if number in came), 0)

    def _beat(self, ended: bool) -> Beat:
        """This rank's state now."""
        waiting, where = main_thread_stands(self._main)
        self._count += 1
        return Beat(
            rank=self._env.rank,
            count=self._count,
            step=self._step,
            phase=self._phase,
            idle_s=time.monotonic() - self._moved,
            patient=self._patience > 0,
            waiting=waiting,
            where=where,
            moves=self._moves,
            line=self._line,
            host=self._peers.host,
            pid=os.getpid(),
            ended=ended,
            signal=self._ended_by,
        )

    def _publish(self, ended: bool) -> None:
        """Give a sign of life."""
        beat = self._beat(ended)
        self._store.set(f"beat/{beat.rank}", beat.encode())
        self._peers.update(beat, time.monotonic())

    def _exchange(self, ended: bool = False) -> Verdict | None:
        """Publish a beat, read the others', judge; the verdict all agree on, if there is one."""
        store, now = self._store, time.monotonic()
        self._publish(ended or self._closing)
        self._exchanges += 1
        if store.check(["verdict"]):
            return Verdict.decode(store.get("verdict"))
        keys = [f"beat/{rank}" for rank in range(self._env.world_size)]
        for rank in self._peers.missing:
            if store.check([keys[rank]]):
                self._peers.update(Beat.decode(store.get(keys[rank])), now)
        self._read_known()
        if self._failure is not None and self._secondary_since is None:
            return self._propose(self._failure)
        found = self._peers.judge(now, self._timeout_s, self._silence_s)
        if found is not None:
            # A rank may have taken leave and ended since its beat was read (this thread may stand still in between);
            # what it said last is in the store by the time its process is gone.
            self._read_known()
            found = self._peers.judge(time.monotonic(), self._timeout_s, self._silence_s)
        if found is None and self._failure is not None and self._secondary_since is not None:
            # Nothing better was heard in the time it takes to learn that a machine is down.
            found = self._failure if now - self._secondary_since > self._silence_s + 2 * self._interval else None
        return None if found is None else self._propose(found)

    def _read_known(self) -> None:
        """Take in the newest beats of all ranks heard of."""
        now, keys = time.monotonic(), [f"beat/{rank}" for rank in sorted(self._peers.beats)]
        for text in self._store.multi_get(keys):
            self._peers.update(Beat.decode(text), now)

    def _propose(self, verdict: Verdict) -> Verdict:
        """The first verdict proposed by any rank."""
        return Verdict.decode(self._store.compare_set("verdict", "", verdict.encode()))

    def _last_words(self, ended: bool) -> Verdict | None:
        """On such a signal: the reason, if one is known within a moment; otherwise tell the peers that it came."""
        verdict = self._exchange(ended)
        until = time.monotonic() + (2 * BEAT_S if self._hosting else BEAT_S)
        while verdict is None and time.monotonic() < until:
            time.sleep(0.1)
            verdict = self._exchange(ended)
        return verdict

    def _without_store(self) -> Verdict | None:
        """The store's host is gone: say who that was. None: it had taken leave in good order (all were told to)."""
        for beat in self._peers.beats.values():
            if beat.signal:
                return self._peers.signaled(beat)
        if self._env.agent_store:
            text = f"the launcher (torchrun), or its machine, died {at_step(self._step, self._phase)}"
            return Verdict(-1, f"{text}: nothing holds the ranks together any more")
        first = self._peers.beats.get(0)
        if first is not None and first.ended:
            return None
        how = "killed, for want of memory perhaps, or its machine or network is down"
        return Verdict(0, f"rank 0 died {at_step(self._step, self._phase)} (its store no longer answers: {how})")

    def _all_left(self) -> bool:
        """Whether the store may go: only its host has to ask."""
        left = [beat for beat in self._peers.beats.values() if beat.ended]
        return not self._hosting or len(left) == self._env.world_size

    def _end(self, verdict: Verdict, lost: bool) -> NoReturn:
        """Print the verdict on one rank, the lowest that lives, and leave on all."""
        self._peers.wake_stopped()
        verdict = with_stacks(verdict, self.stacks)
        if not lost:
            # Should the store be lost now, its host has told the verdict and left.
            with contextlib.suppress(*LOST):
                self._tell(verdict)
        else:
            # Without a store nobody can be asked: on each machine the first process speaks, or the second for it.
            dead_first = verdict.rank == self._env.rank - self._env.local_rank
            if self._env.local_rank == int(dead_first) and not self._closing:
                self._print(verdict)
        self._leave(verdict.code)

    def _tell(self, verdict: Verdict) -> None:
        """Print, or wait until another rank has; raises what a lost store raises."""
        store, me = self._store, self._env.rank
        # Rank 0 first: on several machines its terminal is the one looked at. Nobody leaves before it is told, since
        # at the first exit a launcher ends the rest.
        until = time.monotonic() + (0.0 if me == 0 else 2 * self._interval)
        while time.monotonic() < until and not store.check(["teller"]):
            time.sleep(0.05)
        if store.add("teller", 1) == 1:
            self._print(verdict)
            store.set("verdict-shown", "1")
        until = time.monotonic() + FAREWELL_S
        while time.monotonic() < until and not store.check(["verdict-shown"]):
            time.sleep(0.05)
        store.add("heard", 1)
        if me != verdict.rank:
            time.sleep(0.3)  # the guilty rank leaves first, for a launcher blames the first to leave
        # Whoever is still starting must find the store, and the verdict in it.
        until = time.monotonic() + (STORE_S if self._peers.missing else max(FAREWELL_S, 2 * self._interval))
        gone = [beat for beat in self._peers.beats.values() if beat.ended or self._peers.gone(beat)]
        expected = self._env.world_size - len(gone)
        while self._hosting and time.monotonic() < until and store.add("heard", 0) < expected:
            time.sleep(0.05)

    def _print(self, verdict: Verdict) -> None:
        tell(f"{verdict.detail}error: {verdict.text}")

    def _leave(self, code: int) -> NoReturn:
        """End this process and its children at once, with what was printed written out."""
        for stream in (sys.stdout, sys.stderr):
            # In a thread, for a write of the main thread may hold the stream's lock for ever.
            flush = threading.Thread(target=stream.flush, daemon=True)
            flush.start()
            flush.join(1.0)
        end_at_once(code)
