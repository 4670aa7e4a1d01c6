"""A store that falls silent is noticed, and one that answers is not."""

from __future__ import annotations

import threading
import time

from parallel.watch_store import StoreMinder


def test_silence_is_counted_from_the_last_answer() -> None:
    answers, told, enough = [0], list[float](), threading.Event()

    def silent(seconds: float) -> None:
        told.append(seconds)
        if len(told) >= 3:
            enough.set()

    minder = StoreMinder(lambda: answers[0], 0.05, silent)
    assert enough.wait(10)
    minder.close()
    assert told[:3] == [0.05, 0.1, 0.15000000000000002] and not minder.is_alive()


def test_a_store_that_answers_is_left_alone() -> None:
    answers, told = iter(range(1 << 30)), list[float]()
    minder = StoreMinder(lambda: next(answers), 0.01, told.append)
    time.sleep(0.2)
    minder.close()
    assert not told
