"""Run a test function on several local ranks: real processes, reserved port, hard timeout, the first real traceback."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import random
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess, SpawnProcess
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch

from tests.support.fork_server import die_with_server, environment, fork_context

GRACE_S = 1.0
"""After the first failure: seconds to hear of the failure that caused it, since peers of a dead rank fail too."""
EXIT_S = 10.0
"""Seconds a finished rank may take to leave."""
Process = SpawnProcess | ForkServerProcess


@dataclass(frozen=True)
class _WireTensor:
    """A tensor by value: torch's own multiprocessing shares memory, which is gone once the child has left."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    raw: np.ndarray


def _pack(value: Any) -> Any:
    """Replace tensors inside tuples, lists and dicts by their bytes."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return _WireTensor(value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy())
    if isinstance(value, dict):
        return {key: _pack(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_pack(item) for item in value)
    return value


def _unpack(value: Any) -> Any:
    """Undo `_pack`."""
    if isinstance(value, _WireTensor):
        if not value.raw.size:
            return torch.empty(value.shape, dtype=value.dtype)
        return torch.from_numpy(value.raw.copy()).view(value.dtype).reshape(value.shape)
    if isinstance(value, dict):
        return {key: _unpack(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_unpack(item) for item in value)
    return value


class _Home:
    """What a rank inherits of the test, which the process it is forked from does not know: variables, and where pytest
    has its output go at present."""

    def __init__(self, variables: dict[str, str]) -> None:
        self.variables = {**os.environ, **variables}

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled while the rank is started, which is when descriptors can be passed.
        return _arrived, (self.variables, DupFd(1), DupFd(2))


def _arrived(variables: dict[str, str], *output: Any) -> None:
    """In the rank, before anything else is unpickled."""
    os.environ.clear()
    os.environ.update(variables)
    for target, passed in zip((1, 2), output, strict=True):
        descriptor = passed.detach()
        os.dup2(descriptor, target)
        os.close(descriptor)


def _child(home: _Home | None, fn: Callable[..., Any], rank: int, world: int, args: Any, pipe: Connection) -> None:
    """One rank, in a process group of its own so that its children die with it."""
    os.setsid()
    die_with_server()
    faulthandler.register(signal.SIGUSR1, file=2)
    torch.set_num_threads(1)
    try:
        message = ("result", time.monotonic(), _pack(fn(rank, world, *args)))
    except BaseException:  # SystemExit and KeyboardInterrupt of a rank are failures of the test, too
        message = ("error", time.monotonic(), traceback.format_exc())
    try:
        pipe.send(message)
    except Exception:  # unpicklable result
        pipe.send(("error", time.monotonic(), traceback.format_exc()))
    with contextlib.suppress(EOFError):
        pipe.recv()  # rank 0 hosts the rendezvous store: stay until every rank is done
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


PORTS = range(15_000, 32_000)
"""Linux gives out those from 32,768 on."""
_ports = iter(random.Random(os.getpid()).sample(PORTS, len(PORTS)))
"""In an order of each process's own; none is used twice."""


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A free port that stays ours: bound but not listening, so that only rank 0's SO_REUSEADDR listener can take it.

    Below those that the system gives to whoever connects: started ranks still import when the test lets go of it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for port in _ports:
            with contextlib.suppress(OSError):
                holder.bind(("127.0.0.1", port))
                break
        yield port


def _kill(processes: list[Process]) -> None:
    """Kill what still runs, with its own children, and reap it."""
    for process in processes:
        if process.is_alive() and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                # The group exists only once the child has called setsid; before that, kill the process alone.
                if os.getpgid(process.pid) == process.pid:
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
    for process in processes:
        process.join()


def _collect(processes: list[Process], pipes: list[Connection], deadline: float) -> dict[int, tuple[str, float, Any]]:
    """Wait for every rank's message, after a failure only GRACE_S longer; a rank that gave none in time is left out."""
    messages: dict[int, tuple[str, float, Any]] = {}
    while len(messages) < len(processes):
        waiting = {rank for rank in range(len(processes)) if rank not in messages}
        handles: dict[Any, int] = {pipes[rank]: rank for rank in waiting} | {
            processes[rank].sentinel: rank for rank in waiting
        }
        ready = wait(list(handles), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in {handles[handle] for handle in ready}:
            try:
                if pipes[rank].poll():
                    messages[rank] = pipes[rank].recv()
                    continue
            except (EOFError, ConnectionError):
                pass  # died before, or while, speaking
            processes[rank].join(EXIT_S)
            # A silent death explains the errors of its peers: sort it first.
            messages[rank] = ("error", 0.0, f"died with exit code {processes[rank].exitcode} and left no traceback\n")
        if any(kind == "error" for kind, _, _ in messages.values()):
            deadline = min(deadline, time.monotonic() + GRACE_S)
    return messages


def run_ranks[T](
    fn: Callable[..., T], world: int, *args: Any, timeout: float = 120.0, backend: str = "gloo"
) -> list[T]:
    """Call `fn(rank, world, *args)` in `world` fresh processes with torchrun's variables set.

    torch.distributed is not initialized: that is `parallel.world.groups.make_groups`'s to do. With gloo the processes
    are forked from one that has imported everything; with NCCL each imports for seven seconds by itself, since CUDA
    does not survive a fork.

    Args:
        fn: a function at the top level of an importable module.
        world: number of processes.
        *args: picklable arguments.
        timeout: seconds for everything; then all ranks are killed.
        backend: "gloo" hides CUDA devices from the ranks; "nccl" leaves them visible.

    Returns:
        The results by rank. Tensors in (nested) tuples, lists and dicts arrive as CPU tensors of the same dtype.

    Raises:
        RuntimeError: a rank failed (its traceback is in the message, the earliest failure first).
        TimeoutError: ranks were still running after `timeout`; their stacks are in the captured stderr.
    """
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"backend {backend!r} is not gloo or nccl")
    forked = backend == "gloo"
    context: Any = fork_context() if forked else multiprocessing.get_context("spawn")
    deadline = time.monotonic() + timeout
    processes: list[Process] = []
    pipes: list[Connection] = []
    try:
        with reserved_port() as port:
            for rank in range(world):
                ours, theirs = context.Pipe()
                variables = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",
                }
                if backend == "gloo":
                    variables |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
                with environment(variables):
                    home = _Home(variables) if forked else None
                    process = context.Process(
                        target=_child, args=(home, fn, rank, world, args, theirs), name=f"rank{rank}"
                    )
                    process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            messages = _collect(processes, pipes, deadline)
        failures = sorted((when, rank, text) for rank, (kind, when, text) in messages.items() if kind == "error")
        if failures:
            told = "\n".join(f"--- rank {rank} of {world}:\n{text}" for _, rank, text in failures)
            raise RuntimeError(f"rank {failures[0][1]} of {world} failed in {fn.__qualname__}\n{told}")
        late = [rank for rank in range(world) if rank not in messages]
        if late:
            for rank in late:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(processes[rank].pid or 0, signal.SIGUSR1)
            time.sleep(0.2)  # let them write their stacks
            raise TimeoutError(
                f"ranks {late} of {world} still ran {fn.__qualname__} after {timeout:g} s; all were killed"
            )
        for pipe in pipes:
            pipe.send("release")
        for process in processes:
            process.join(EXIT_S)
        return [_unpack(messages[rank][2]) for rank in range(world)]
    finally:
        _kill(processes)
        for pipe in pipes:
            pipe.close()
