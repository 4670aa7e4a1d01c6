"""The store at which the watching threads of `watch` meet, and a second thread that notices when it falls silent.

A store whose host is stopped, or whose machine vanished without a word, holds a call for ever, whatever its time-out.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable

import torch.distributed as dist

from parallel.world.meeting import open_store
from parallel.world.rank_env import RankEnv

STORE_S = 30.0
"""Seconds a call to the store may take."""


def meet(env: RankEnv, timeout_s: float) -> dist.Store:
    """A new connection to the store at which init_process_group meets too (which shares rank 0's server).

    Raises:
        LongspanError: it cannot be reached.
    """
    store = open_store(env, timeout_s)
    store.set_timeout(datetime.timedelta(seconds=STORE_S))
    return dist.PrefixStore(f"longspan/watch/{env.attempt}", store)


class StoreMinder(threading.Thread):
    """Runs from the start to `close`.

    Args:
        answers: how often the store has answered so far.
        interval_s: between two looks.
        silent: called at every look at which it has not answered since the last, with the seconds that went by so.
    """

    def __init__(self, answers: Callable[[], int], interval_s: float, silent: Callable[[float], None]) -> None:
        super().__init__(name="longspan-store", daemon=True)
        self._answers, self._interval_s, self._silent = answers, interval_s, silent
        self.over = threading.Event()
        """Set: it ends at its next look."""
        self.start()

    def run(self) -> None:
        """The thread."""
        # Looks are counted, not the clock's seconds: while Python's lock is held, or the process stopped, nobody calls
        # the store, and its silence means nothing.
        seen, looks = -1, 0
        while not self.over.wait(self._interval_s):
            looks = looks + 1 if self._answers() == seen else 0
            seen = self._answers()
            if looks:
                self._silent(looks * self._interval_s)

    def close(self) -> None:
        """End it."""
        self.over.set()
        self.join()
