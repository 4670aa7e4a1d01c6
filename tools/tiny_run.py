"""A run's settings, shrunk, through the real trainer on CPU processes: `longspan tiny-run --config run.yaml`

The grid, engine, offload, attention and recompute stay (`support.shrink`). `pipeline.train` is started by torchrun as
on GPUs, stops half-way, goes on by the same command, and must give the losses that one process of engine megatron gives
without a stop. Exit code 0: it does; 1: it does not, or a process failed; 2: the configuration is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from parallel.errors import ConfigError, DataError, LongspanError
from pipeline.config.evaluation import EvalConfig
from pipeline.config.parallel import OffloadConfig, ParallelConfig
from pipeline.config.paths import user_path
from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import dump_config, load_config
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser, whole_number
from tools.support.local_ranks import ROOT, RankFailed
from tools.support.shrink import Shrunk, shrink

PROCESSES = 4
"""At most, unless asked for."""
STOP = 2
"""Optimizer steps before the stop."""
PARITY = 1e-4
"""Relative difference of losses allowed, fp32: sums in another order, enlarged by Adam over a few steps."""
TIMEOUT_S = 300.0
END_S = 10.0
"""Seconds torchrun is given to end its processes."""


@dataclass(frozen=True)
class Outcome:
    """What a tiny run gave."""

    shrunk: Shrunk
    losses: tuple[float, ...]
    """Mean loss of every optimizer step, nats, across the stop."""
    expected: tuple[float, ...]
    """The same of one process without a stop."""
    seconds: float

    @property
    def problem(self) -> str:
        """What is wrong, one sentence; empty: nothing."""
        return compare_losses(self.losses, self.expected)


def compare_losses(losses: Sequence[float], expected: Sequence[float]) -> str:
    """What is wrong with `losses`, one sentence; empty: nothing."""
    if len(losses) != len(expected):
        return f"{len(losses)} steps were recorded and {len(expected)} were to be trained."
    for step, (mine, other) in enumerate(zip(losses, expected, strict=True), start=1):
        if not math.isfinite(mine):
            return f"the loss of step {step} is {mine}."
        if not abs(mine - other) <= PARITY * abs(other):
            after = ", the first after the stop" if step == STOP + 1 else ""
            return f"the loss of step {step}{after} is {mine:.7f}, and {other:.7f} in one process without a stop."
    return ""


def train(path: Path, world: int, log: Path, timeout_s: float, *arguments: str) -> None:
    """`torchrun --nproc-per-node world -m pipeline.train --config path arguments...` on CPU.

    Raises:
        RankFailed: it failed (its sentences, or the end of its log), or took too long.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [sys.executable, "-W", "ignore", *launcher, "-m", "pipeline.train", "--config", str(path), *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise RankFailed(f"{log.stem}: still ran after {timeout_s:g} s and was ended.", None) from None
        finally:
            _end(process)
    if code:
        text = log.read_text(errors="replace")
        sentences = [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]
        # The launcher alone knows which signal ended a process that could not say so itself.
        sentences += [f"torchrun: {found}" for found in re.findall(r"Signal \d+ \(\w+\) received by PID \d+", text)]
        raise RankFailed(
            "\n".join(dict.fromkeys(sentences)) or f"{log.stem} left with code {code}:\n{text[-3000:]}", code
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a launcher that still runs; it ends its own processes when asked, which a kill would not let it do."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def alone(config: RunConfig, output: Path) -> RunConfig:
    """The same training in one process of engine megatron."""
    parallel = ParallelConfig(timeout_s=config.parallel.timeout_s)
    return replace(config, parallel=parallel, eval=EvalConfig(), output=str(output))


def run_tiny(config: RunConfig, folder: Path, processes: int | None, timeout_s: float = TIMEOUT_S) -> Outcome:
    """Shrink `config` into `folder`, train it with a stop, and train it in one process without.

    Raises:
        ConfigError: the configuration is wrong.
        RankFailed: a process failed or hung.
    """
    began = time.perf_counter()
    tiny = shrink(config, folder, processes, PROCESSES)
    evaluation = EvalConfig()
    if config.eval.path is not None:
        evaluation = EvalConfig(path=tiny.config.data.sources[0].path, lengths=(tiny.config.sequence,), windows=2)
    run = replace(tiny.config, eval=evaluation, checks=True)
    (folder / "run.yaml").write_text(dump_config(run))
    (folder / "alone.yaml").write_text(dump_config(alone(run, folder / "alone")))

    # Both import torch, which a wrong configuration need not wait for.
    from pipeline.reporting.metrics import METRICS_FILE, read_metrics
    from tools.support.tiny_checkpoint import write_files

    write_files(run, tiny.model)
    train(folder / "run.yaml", tiny.processes, folder / "first-half.log", timeout_s, "--stop-after", str(STOP))
    half = read_metrics(Path(run.output) / METRICS_FILE)
    if len(half) != STOP:
        raise DataError(f"{run.output}: {len(half)} steps were recorded before the stop after {STOP}.")
    train(folder / "run.yaml", tiny.processes, folder / "second-half.log", timeout_s)
    train(folder / "alone.yaml", 1, folder / "alone.log", timeout_s)
    if f"resumed at step {STOP}" not in (folder / "second-half.log").read_text(errors="replace"):
        raise DataError(f"{folder / 'second-half.log'}: the second start did not resume at step {STOP}.")
    losses, expected = (
        tuple(float(row["loss"]) for row in read_metrics(path / METRICS_FILE))
        for path in (Path(run.output), folder / "alone")
    )
    return Outcome(tiny, losses, expected, time.perf_counter() - began)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = Parser("tools.tiny_run", __doc__, "LAUNCH.md")
    parser.add_argument("--config", type=user_path, required=True, help="YAML of the run")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting; repeatable")
    parser.add_argument("--nproc", type=whole_number(), help=f"CPU processes (default: at most {PROCESSES})")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="S", help="seconds for each start")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 the losses are right, 1 not, 2 wrong configuration."""
    args = parse(argv)
    try:
        config = load_config(args.config, args.set)
        with tempfile.TemporaryDirectory(prefix="longspan-tiny-") as name:
            outcome = run_tiny(config, Path(name), args.nproc, args.timeout)
    except ConfigError as error:
        # `shrink` speaks of the doctor's option.
        raise ConfigError(str(error).replace("--processes", "--nproc")) from None
    except LongspanError as error:
        print(f"FAIL: {error}", file=sys.stderr)
        return 1
    tiny, grid = outcome.shrunk, outcome.shrunk.config.parallel
    kept = f"engine {grid.engine}"
    if grid.offload != OffloadConfig():
        kept += f", offload params {grid.offload.params}, optimizer {grid.offload.optimizer}"
    dp = tiny.processes // (grid.tp * grid.cp * grid.pp)
    print(f"tiny run: {kept}, tp {grid.tp} x cp {grid.cp} x dp {dp} x pp {grid.pp}, {outcome.seconds:.0f} s")
    print(f"  stopped after {STOP}, resumed: " + " ".join(f"{loss:.6f}" for loss in outcome.losses))
    print("  one process, no stop:    " + " ".join(f"{loss:.6f}" for loss in outcome.expected))
    for note in tiny.notes:
        print(f"Note: {note}")
    if outcome.problem:
        print(f"FAIL: {outcome.problem}", file=sys.stderr)
        return 1
    print("PASS: the losses continue across the stop and are those of one process.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
