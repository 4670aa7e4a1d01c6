"""A rank that fails on demand, for test_faults: `python -m tests.integration.faulty FAULT RANK STEP ARGUMENT...`.

FAULT names a function below, or is `none`. With `--config` the arguments go to the real trainer, at whose optimizer
step STEP the rank fails; otherwise they are a time-out in seconds, for a loop of nothing but watched all-reduces, and
anything that marks the process.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from parallel.errors import ConfigError, DataError
from parallel.world.rank_env import RankEnv


def user_error() -> None:
    raise DataError("The text is missing; put it back.")


def bug() -> None:
    raise RuntimeError("planted bug")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    time.sleep(1000)


def leave_to_tests() -> None:
    """Everybody works on until the test does something to them."""
    print("up", flush=True)
    time.sleep(0.1)


def fail(fault: str) -> None:
    """Let it happen, and leave word of when: the job's end is timed from there."""
    if fault != "leave_to_tests":
        print(f"fault at {time.time()}", flush=True)
    FAULTS[fault]()


FAULTS = {function.__name__: function for function in (user_error, bug, kill, freeze, hang, leave_to_tests)}


def real(fault: str, rank: int, step: int, arguments: list[str]) -> int:
    """The trainer, with the fault in this rank's model."""
    from pipeline import train
    from pipeline.model.rank_model import RankModel

    env = RankEnv.read()
    inner, steps = RankModel.train_step, 0

    def train_step(*args: object, **kwargs: object) -> object:
        nonlocal steps
        steps += 1
        if fault != "none" and env.rank == rank and steps == step:
            fail(fault)
        return inner(*args, **kwargs)  # type: ignore[arg-type]

    RankModel.train_step = train_step  # type: ignore[assignment, method-assign]
    return train.main(arguments)


def loop(fault: str, rank: int, step: int, timeout_s: float) -> int:
    """Steps of one all-reduce each; a step 0 fails before the process group is made."""
    import torch
    import torch.distributed as dist

    from parallel.health.watch import watch_ranks

    env = RankEnv.read()
    with watch_ranks(env, timeout_s) as watch:
        if env.rank == rank and step == 0:
            print(f"fault at {time.time()}", flush=True)
            raise ConfigError("Nothing to build from; name a model.")
        dist.init_process_group("gloo")
        for now in range(1, 6 if fault == "none" else 1000):
            watch.progress(now)
            if fault == "freeze":  # who has never been heard of cannot be told from one that has not come up
                time.sleep(0.5)
            if env.rank == rank and (now == step if fault != "leave_to_tests" else now >= step) and fault != "none":
                fail(fault)
            dist.all_reduce(torch.ones(1))
        dist.destroy_process_group()
    import threading

    # One write: ranks share the pipe, and a line of one must not end up inside another's.
    os.write(1, f"left: {[thread.name for thread in threading.enumerate()]}\n".encode())
    return 0


if __name__ == "__main__":
    _, fault, rank, step, *rest = sys.argv
    if rest[0] == "--config":
        sys.exit(real(fault, int(rank), int(step), rest))
    sys.exit(loop(fault, int(rank), int(step), float(rest[0])))
