"""Where a rank stands still because of another: it is not the one to blame."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from parallel.health.liveness import stands
from parallel.world.agreement import require_alike
from parallel.world.meeting import arrive
from parallel.world.rank_env import RankEnv
from tests.support.ranks import reserved_port

PATIENCE = timedelta(seconds=60)


def waiting_in(name: str, work: Callable[[], object]) -> tuple[threading.Thread, bool]:
    """A thread at `work`, once it stands in a function of this name, and whether it is taken to wait for a peer."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert thread.ident is not None
    for _ in range(600):
        waiting, where = stands(sys._current_frames().get(thread.ident))
        if where.endswith(f" in {name}"):
            return thread, waiting
        time.sleep(0.05)
    pytest.fail(f"it never came to {name}: {where}")


def test_a_rank_that_waits_for_the_others_settings_only_waits() -> None:
    store = dist.HashStore()
    thread, waiting = waiting_in("require_alike", lambda: require_alike(store, 1, 2, "test", {"a": "b"}, PATIENCE))
    store.set("longspan/alike/test/verdict", "")
    thread.join()
    assert waiting


def test_a_rank_that_is_there_before_the_others_only_waits() -> None:
    with reserved_port() as port:
        env = RankEnv(0, 2, launched=True, master_port=port)
        thread, waiting = waiting_in("arrive", lambda: arrive(env, PATIENCE))
        other = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)
        other.set("longspan/arrived/0/all", "")
        thread.join()
    assert waiting
