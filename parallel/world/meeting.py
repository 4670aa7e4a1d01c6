"""Where the ranks meet: a connection to their store, or one sentence on why there is none."""

from __future__ import annotations

import datetime
import errno
import os
import socket
import time

import torch.distributed as dist

from parallel.errors import LongspanError
from parallel.world.rank_env import RankEnv

# What a store raises when its host is gone.
LOST = (dist.DistError, ConnectionError, RuntimeError)
RESOLVE_S = 10.0
"""A name is looked up for so long: a machine's network may be up a moment after the job."""


def open_store(env: RankEnv, timeout_s: float) -> dist.TCPStore:
    """A new connection to the ranks' store, which rank 0 hosts unless the launcher does.

    Args:
        env: this process among its peers.
        timeout_s: time the host may come later than this rank.

    Raises:
        LongspanError: the name does not resolve, the port is taken, or nothing answers there.
    """
    refuse_unknown_host(env.master_host, f"Rank {env.rank}")
    hosting = env.rank == 0 and not env.agent_store
    try:
        return dist.TCPStore(
            env.master_host,
            env.master_port,
            is_master=hosting,
            timeout=datetime.timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=hosting,
        )
    except LOST as error:
        raise LongspanError(
            f"Rank {env.rank}: {cannot_meet(env.master_host, env.master_port, error, hosting)}"
        ) from None


def arrive(env: RankEnv, patience: datetime.timedelta) -> dist.Store:
    """The launcher's store, once every rank has reached it: on a busy machine ranks import for seconds to minutes,
    which the time-out of a collective need not cover."""
    store = open_store(env, patience.total_seconds())
    key = f"longspan/arrived/{env.attempt}"
    if store.add(key, 1) == env.world_size:
        store.set(f"{key}/all", "")
    store.wait([f"{key}/all"], patience)
    return dist.PrefixStore(f"longspan/groups/{env.attempt}", store)


def refuse_unknown_host(host: str, who: str) -> None:
    """Return once the name resolves: torch would try for its whole time-out, and say nothing meanwhile.

    Raises:
        LongspanError: it does not.
    """
    until = time.monotonic() + RESOLVE_S
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > until:
                raise LongspanError(
                    f"{who}: MASTER_ADDR {host!r} does not resolve here ({error.strerror or error}); set it to a name "
                    "or address of rank 0's machine that every machine knows."
                ) from None
            time.sleep(0.5)


def cannot_meet(host: str, port: int, error: BaseException, hosting: bool) -> str:
    """One sentence on a store that could not be opened, or hosted."""
    reason = str(error).splitlines()[0]
    if hosting and (os.strerror(errno.EADDRINUSE) in reason or "EADDRINUSE" in reason):
        return (
            f"port {port} of this machine is taken, by another job perhaps, so the ranks cannot meet there; set "
            "MASTER_PORT to a free one, on all machines."
        )
    return (
        f"the ranks cannot meet at {host}:{port} ({reason}); see that rank 0's machine is reachable there and the port "
        "free."
    )
