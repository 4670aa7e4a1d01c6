"""Sums over a group, in a fixed order, and nothing when the group is one rank; work that rank 0 does for all."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from parallel.errors import LongspanError
from parallel.world.agreement import require_alike
from parallel.world.groups import START, Groups

_POLL_S = (0.02, 0.5)
"""First and longest pause between two looks at the store."""
_FAREWELL_S = 10.0
"""Rank 0, which may host the store, stays so long to let every rank read why it fails."""
_NAME = 64
"""Bytes of a machine's name that are sent."""
_calls = itertools.count()
"""Every rank makes these calls in the same order, so the count names them alike everywhere."""


def sum_over(group: dist.ProcessGroup, tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` (any shape, dtype) over `group`, in place; returns it."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def agree(groups: Groups, numbers: Sequence[int], failure: str | None = None) -> tuple[list[int], str | None]:
    """The largest of every number over all ranks, and the reason of a rank that failed; alike on every rank.

    Tiny, and in host memory: a GPU is not waited for. Every rank of the world must call this.

    Args:
        numbers: at least 0.
        failure: why this rank failed, if it did.

    Returns:
        The maxima, and the highest failed rank's reason (None: none failed).
    """
    if groups.plan.world_size == 1:
        return list(numbers), failure
    store, key, me = dist.distributed_c10d._get_default_store(), f"longspan/agree/{next(_calls)}", groups.env.rank
    if failure is not None:
        store.set(f"{key}/{me}", failure)
    found = torch.tensor([*numbers, 0 if failure is None else me + 1], dtype=torch.int64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=groups.host)
    *largest, failed = found.tolist()
    if not failed:
        return largest, None
    reason = store.get(f"{key}/{failed - 1}").decode()
    return largest, reason if failed - 1 == me else f"rank {failed - 1}: {reason}"


def share_from_main(groups: Groups, make: Callable[[], str]) -> str:
    """The text that rank 0 makes, on every rank; however long it takes. Every rank of the world must call this.

    The others ask the rendezvous store now and then, on any backend: no collective is pending whose timeout a long
    work of rank 0 would exceed.

    Raises:
        LongspanError: rank 0's work raised it; the same class and sentence on every rank (of a class that a sentence
            alone does not make, or that another rank has not imported, there its nearest base).
        Exception: on rank 0 whatever else `make` raised; the other ranks get a LongspanError naming it.
    """
    if groups.plan.world_size == 1 or groups.fake:
        return make()
    store, key = dist.distributed_c10d._get_default_store(), f"longspan/main/{next(_calls)}"
    if not groups.is_main:
        _pause_until(lambda: store.check([key]))
        done, kinds, text = json.loads(store.get(key))
        if done:
            return str(text)
        store.add(f"{key}/heard", 1)
        raise _made_again(kinds, text)
    try:
        text = make()
    except BaseException as error:
        kinds = [_named(kind) for kind in type(error).__mro__ if issubclass(kind, LongspanError)]
        sentence = str(error) if kinds else f"Rank 0 failed ({type(error).__name__}: {error}); see its traceback."
        store.set(key, json.dumps([False, kinds, sentence]))
        others = groups.plan.world_size - 1
        _pause_until(lambda: store.add(f"{key}/heard", 0) >= others, _FAREWELL_S)
        raise
    store.set(key, json.dumps([True, [], text]))
    return text


def _named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _made_again(kinds: Sequence[str], text: str) -> LongspanError:
    """An error that another rank raised, of the first of these classes that is here and that `text` alone makes.

    Looked for among the classes of this process: nothing is imported because another one named it.
    """
    known, left = dict[str, type[LongspanError]](), [LongspanError]
    while left:
        kind = left.pop()
        known[_named(kind)] = kind
        left += kind.__subclasses__()
    for name in kinds:
        with contextlib.suppress(KeyError, TypeError):
            return known[name](text)
    return LongspanError(text)


def on_main_first[T](groups: Groups, work: Callable[[], T]) -> T:
    """Do `work` on rank 0, then on all the others (which find on the disk what it left); see `share_from_main`.

    Returns:
        Each rank's own result.
    """
    results: list[T] = []

    def first() -> str:
        results.append(work())
        return ""

    share_from_main(groups, first)
    return results[0] if results else work()


def of_every_rank(groups: Groups, numbers: Sequence[float]) -> list[tuple[list[float], str]]:
    """Each rank's numbers and the name of its machine, by rank, on every rank of the world; in host memory.

    Args:
        numbers: as many on every rank.
    """
    # Bytes of the numbers and of the name: nothing is unpickled that another process sent.
    count, name = len(numbers), socket.gethostname().encode()[:_NAME].ljust(_NAME)
    raw = [struct.pack(f"{count}d", *numbers) + name]
    if groups.plan.world_size > 1:
        sent = torch.frombuffer(bytearray(raw[0]), dtype=torch.uint8)
        every = [torch.empty_like(sent) for _ in range(groups.plan.world_size)]
        dist.all_gather(every, sent, group=groups.host)
        raw = [bytes(one.tolist()) for one in every]
    size = struct.calcsize(f"{count}d")
    return [(list(struct.unpack(f"{count}d", one[:size])), one[size:].decode(errors="replace").strip()) for one in raw]


def require_same(groups: Groups, facts: Mapping[str, str]) -> None:
    """Return if every rank of the world brings the same facts; every one of them must call this.

    Args:
        facts: name -> value, as a refusal shows them.

    Raises:
        ConfigError: they differ; the same sentence on every rank names the facts, the ranks and the values.
    """
    if groups.plan.world_size > 1 and not groups.fake:
        store, topic = dist.distributed_c10d._get_default_store(), f"facts-{next(_calls)}"
        require_alike(store, groups.env.rank, groups.plan.world_size, topic, facts, START)


def _pause_until(happened: Callable[[], bool], limit_s: float = float("inf")) -> None:
    """Sleep between looks, ever longer, until it happened or the limit passed."""
    began, (pause, longest) = time.monotonic(), _POLL_S
    while not happened() and time.monotonic() - began < limit_s:
        time.sleep(pause)
        pause = min(2 * pause, longest)
