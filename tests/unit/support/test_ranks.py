"""The multi-process test runner itself: order, values, failures, hangs, orphans."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import reserved_port, run_ranks


def values(rank: int, world: int, base: float) -> dict[str, Any]:
    """Every kind of result a test sends back, and the environment it saw."""
    return {
        "rank": rank,
        "env": [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")],
        "tensors": (torch.full((2, 3), base + rank, dtype=torch.bfloat16), [torch.tensor(rank), torch.zeros(0)]),
        "flag": torch.tensor([True, False]),
        "cuda": torch.cuda.is_available(),
    }


def summed(rank: int, world: int) -> float:
    """Join a gloo group by the variables alone and sum; rank 0, the store's host, is done first."""
    torch.distributed.init_process_group("gloo")
    total = torch.tensor(float(rank + 1))
    torch.distributed.all_reduce(total)
    if rank:
        time.sleep(0.5)
        torch.distributed.new_group([rank], use_local_synchronization=True)  # needs the store
    return total.item()


def misbehave(rank: int, world: int, how: str) -> None:
    """Rank 1 raises, dies or hangs; rank 0 waits for it in a collective."""
    torch.distributed.init_process_group("gloo")
    if rank == 1:
        if how == "raise":
            raise KeyError("the real reason")
        if how == "die":
            os._exit(7)
        if how == "unpicklable":
            return lambda: None  # type: ignore[return-value]
        time.sleep(1000)
    torch.distributed.all_reduce(torch.ones(1))


def with_child(rank: int, world: int, note: str) -> None:
    """Start a grandchild, note its id, and hang."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path(note).write_text(str(child.pid))
    time.sleep(1000)


def test_results_by_rank_with_tensors_by_value() -> None:
    results = run_ranks(values, 2, 0.5)
    for rank, result in enumerate(results):
        assert result["rank"] == rank
        assert result["env"] == [str(rank), "2", str(rank), "1"]
        big, (small, empty) = result["tensors"]
        assert torch.equal(big, torch.full((2, 3), 0.5 + rank, dtype=torch.bfloat16))
        assert small.dtype == torch.int64 and small.shape == () and small.item() == rank
        assert empty.shape == (0,)
        assert result["flag"].tolist() == [True, False]
        assert result["cuda"] is False
    assert "RANK" not in os.environ


def test_ranks_can_meet_at_thereserved_port() -> None:
    assert run_ranks(summed, 3) == [6.0, 6.0, 6.0]


def test_areserved_port_is_nobody_elses() -> None:
    with reserved_port() as port, socket.socket() as other:
        with pytest.raises(OSError):
            other.bind(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("how", "said"),
    [("raise", "KeyError: 'the real reason'"), ("die", "exit code 7"), ("unpicklable", "lambda")],
)
def test_the_first_failure_is_the_one_told(how: str, said: str) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="^rank 1 of 2 failed in misbehave") as caught:
        run_ranks(misbehave, 2, how, timeout=60)
    assert said in str(caught.value)
    assert time.monotonic() - start < 40, "the failure must not wait for the timeout"


def test_a_hang_is_killed_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    run_ranks(values, 1, 0.0)  # what ranks are forked from has started
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 1 still ran with_child after 5 s"):
        run_ranks(with_child, 1, str(note), timeout=5)
    pid = int(note.read_text())
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"grandchild {pid} survived")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'mpi' is not gloo or nccl"):
        run_ranks(values, 1, 0.0, backend="mpi")
