"""Kill one rank mid-step and mid-save, go on on half the ranks: the losses must continue.

docs/BENCHES.md says how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import psutil
from rich.table import Table

from parallel.errors import ConfigError, LongspanError
from parallel.health.watch import SIGTERM_CODE
from pipeline.checkpoint.choose import choose
from pipeline.checkpoint.manifest import WRITING, folder_name
from pipeline.config.parallel import ParallelConfig
from pipeline.config.paths import user_path
from pipeline.config.run import RunConfig
from pipeline.config.sections import DataConfig, ModelConfig, SaveConfig, TrainConfig
from pipeline.config.yaml_file import dump_config
from pipeline.reporting.command import command
from pipeline.reporting.metrics import METRICS_FILE, read_metrics
from pipeline.reporting.parser import Parser
from tools.support.command_line import add_integers, console_of
from tools.support.local_ranks import ROOT, RankFailed
from tools.support.shapes import config_json, llama2
from tools.support.tiny_checkpoint import write_files

LIMIT = {"bf16": 5e-3, "fp32": 1e-5}
"""Largest relative difference of a step's loss: another layout adds up in another order (bf16: 9e-4 seen)."""
FALL = 5.0
"""The undisturbed loss must fall by so many limits, or a run that started over would pass too."""
END_S = 60.0
"""Longest from a kill to the end of the job."""
ORPHAN_S = 5.0
"""Longest a process may outlive its launcher."""
TRIES = 5
"""A kill meant to hit a save may come too late; so many jobs are killed until one hits."""
POLL_S = 0.002


@dataclass(frozen=True)
class Case:
    """A kill and what followed."""

    name: str
    rank: int
    """The killed one."""
    at_step: int
    """In progress, or being saved."""
    seconds: float
    """From the kill to the launcher's end."""
    code: int
    """The launcher's."""
    left: str
    """Of the save that was cut off."""
    resumed: int
    """Step of the checkpoint that was gone on from."""
    ranks: int
    """That went on."""
    worst: float
    """Largest relative difference of a loss with the undisturbed run, over the steps after the resume."""
    kills: int
    problems: tuple[str, ...]


class Job:
    """`pipeline.train` on some local ranks; a context manager that leaves no process behind.

    Args:
        settings: `a.b=c` that differ from the YAML.
        timeout_s: for everything.
    """

    def __init__(
        self, config: Path, settings: Sequence[str], world: int, log: Path, timeout_s: float, cuda: bool
    ) -> None:
        self.log, self.world, self._timeout_s, self._until = log, world, timeout_s, time.monotonic() + timeout_s
        self._mark = str(config)
        quiet = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
        words = [word for setting in settings for word in ("--set", setting)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", *launcher, "-m", "pipeline.train", "--config", self._mark, *words],
                cwd=ROOT,
                env=os.environ | ({} if cuda else quiet),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def rank(self, rank: int) -> int:
        """Process id of a rank, once torchrun has started it."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                environment = {f"{name}={value}" for name, value in child.environ().items()}
                if "pipeline.train" in child.cmdline() and f"RANK={rank}" in environment:
                    return child.pid
        raise RankFailed(f"{self.log}: rank {rank} is not among the launcher's processes.", None)

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait for it, looking every few milliseconds.

        Raises:
            RankFailed: the job ended first, or its time was up.
        """
        while not happened():
            if self.process.poll() is not None:
                raise RankFailed(
                    f"{self.log}: ended too early, with code {self.process.returncode}:\n{self.tail}", None
                )
            if time.monotonic() > self._until:
                raise RankFailed(f"{self.log}: was not so far after {self._timeout_s:g} s; raise --timeout.", None)
            time.sleep(POLL_S)

    def end(self, limit_s: float = math.inf) -> int:
        """Wait for the launcher's end and return its exit code; RankFailed: it has not ended in time."""
        try:
            return self.process.wait(max(0.1, min(limit_s, self._until - time.monotonic())))
        except subprocess.TimeoutExpired:
            raise RankFailed(f"{self.log}: still ran when its time was up.", None) from None

    @property
    def tail(self) -> str:
        """The log's end."""
        return self.log.read_text(errors="replace")[-3000:]

    def processes(self) -> list[psutil.Process]:
        """Whatever runs with this job's configuration."""
        found = psutil.process_iter(["status", "cmdline"])
        living = [process for process in found if process.info["status"] != psutil.STATUS_ZOMBIE]
        return [process for process in living if self._mark in (process.info["cmdline"] or ())]

    def orphans(self) -> int:
        """Processes that outlive the launcher."""
        until = time.monotonic() + ORPHAN_S
        while (left := len(self.processes())) and time.monotonic() < until:
            time.sleep(0.1)
        return left

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()


class Bench:
    """The runs of one command line; `folder` gets everything."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.dice = args, folder, random.Random(args.seed)
        self.config, self.halved = plan(args, folder)
        self.dtype = "fp32" if args.cpu else "bf16"
        self.losses: dict[int, float] = {}
        """Of the undisturbed run, by step."""
        self.step_s = self.save_s = 0.0
        """Its median step and save."""

    def job(self, name: str, world: int, *settings: str) -> Job:
        """Start one of the runs; `name` without what follows a space is its output folder."""
        path = self.folder / f"{name.split()[0]}.yaml"
        path.write_text(dump_config(replace(self.config, output=str(path.with_suffix("")))))
        log = self.folder / f"{name.replace(' ', '-')}.log"
        return Job(path, settings, world, log, self.args.timeout, not self.args.cpu)

    def reference(self) -> None:
        """The undisturbed run."""
        with self.job("undisturbed", self.args.processes) as job:
            if job.end():
                raise RankFailed(f"{job.log}: the undisturbed run failed:\n{job.tail}", None)
            saves = re.findall(r"saved step-\d+ in ([\d.]+) s", job.log.read_text(errors="replace"))
        rows = self.rows("undisturbed")
        self.losses = {row["step"]: float(row["loss"]) for row in rows}
        self.step_s = statistics.median(float(row["seconds"]) for row in rows[1:])
        self.save_s = max(0.01, statistics.median(map(float, saves)))
        first, last = self.losses[1], self.losses[self.args.steps]
        if not last < first * (1 - FALL * LIMIT[self.dtype]):
            raise RankFailed(f"the loss fell from {first:.4f} to {last:.4f} only: comparing it proves nothing.", None)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Metrics of a run so far."""
        path = self.folder / name / METRICS_FILE
        return read_metrics(path) if path.exists() else []

    def cut_off(self, name: str, step: int | None = None) -> Path | None:
        """The save of `step` (None: of any) that is under way, or was left behind."""
        wanted = "step-*" if step is None else folder_name(step)
        return next((self.folder / name / "checkpoints").glob(WRITING + wanted), None)

    def kill(self, name: str, step: int, saving: bool, victim: int) -> tuple[float, int, list[str]]:
        """Train, kill a rank at a random instant of the step after `step` or of its save; seconds, code, problems."""
        with self.job(name, self.args.processes) as job:
            job.until(lambda: len(self.rows(name)) > 0)
            pid, span = job.rank(victim), self.step_s
            job.until(lambda: len(self.rows(name)) >= step)
            if saving:
                whole = self.folder / name / "checkpoints" / folder_name(step)
                job.until(lambda: self.cut_off(name, step) is not None or whole.exists())
                span = self.save_s
            time.sleep(self.dice.random() * span)
            began = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            code = job.end(END_S)
            seconds = time.monotonic() - began
            problems = [] if code else ["the job's exit code was 0"]
            if orphans := job.orphans():
                problems.append(f"{orphans} processes were left")
        return seconds, code, problems

    def case(self, saving: bool) -> Case:
        """Kill, resume on half the ranks, compare."""
        args, what = self.args, "mid-save" if saving else "mid-step"
        victim = self.dice.randrange(1, args.processes)
        steps = [n for n in range(2 * args.every, args.steps - args.every + 1) if (n % args.every == 0) == saving]
        for kills in range(1, TRIES + 1):
            name, step = f"{what}-{kills}", self.dice.choice(steps)
            seconds, code, problems = self.kill(name, step, saving, victim)
            if not saving or self.cut_off(name, step) is not None:
                break
        left = self.cut_off(name)
        if saving and self.cut_off(name, step) is None:
            problems.append(f"none of {kills} kills hit a save")
        files = [] if left is None else [path.stem.endswith(f"-{victim:05d}") for path in left.iterdir()]
        held = "" if left is None else f"{left.name.removeprefix(WRITING)}: {len(files)} files, {sum(files)} its own"
        if not saving:
            step = len(self.rows(name))  # it may have got on a little
        newest = choose(self.folder / name / "checkpoints")
        resumed = -1 if newest is None else newest.step
        # A save may be under way for longer than the steps up to the next one.
        allowed = step - step % args.every
        oldest = allowed - args.every * (1 if saving or left is None else 2)
        if newest is None or not oldest <= resumed <= allowed or resumed % args.every:
            problems.append(f"the newest whole checkpoint is of step {resumed}")
        half = args.processes // 2
        with self.job(f"{name} resumed", half, *self.halved) as job:
            if job.end():
                problems.append(f"the resumed run failed: {job.tail[-500:]}")
            if f"resumed at step {resumed} from {folder_name(max(resumed, 0))}" not in job.log.read_text():
                problems.append(f"it did not resume at step {resumed}")
        worst = self.compare(name, resumed, problems)
        at_step = step if saving else step + 1
        return Case(what, victim, at_step, seconds, code, held, resumed, half, worst, kills, tuple(problems))

    def compare(self, name: str, resumed: int, problems: list[str]) -> float:
        """Largest relative difference of the losses after `resumed`; every step must be there once."""
        found = {row["step"]: float(row["loss"]) for row in self.rows(name)}
        if [row["step"] for row in self.rows(name)] != list(self.losses):
            problems.append(f"steps {sorted(found)} were recorded, not 1 to {self.args.steps}")
        after = [abs(found.get(n, math.nan) / loss - 1) for n, loss in self.losses.items() if n > resumed]
        if not all(difference <= LIMIT[self.dtype] for difference in after):
            problems.append(f"a loss differs by more than {LIMIT[self.dtype]:g}")
        return math.nan if any(map(math.isnan, after)) else max(after, default=math.nan)


def plan(args: argparse.Namespace, folder: Path) -> tuple[RunConfig, tuple[str, ...]]:
    """The run to train, its files written below `folder`, and the settings with which half the ranks go on.

    Raises:
        ConfigError: the ranks cannot be halved, or the shape is no model.
    """
    if args.processes < 2 or args.processes % (2 * args.tp):
        raise ConfigError(f"--processes: {args.processes} ranks of tp {args.tp} cannot be halved; give a multiple.")
    cp = args.cp
    dp, rest = divmod(args.processes, cp * args.tp)
    if rest:
        raise ConfigError(f"--cp: {cp} x tp {args.tp} does not divide {args.processes} processes.")
    if dp % 2 and cp % 2:
        raise ConfigError(f"--processes: neither dp {dp} nor cp {cp} can be halved; choose another --cp.")
    halved = () if dp % 2 == 0 else (f"parallel.cp={cp // 2}",)
    config = RunConfig(
        model=ModelConfig(str(folder / "base"), context=args.sequence, dtype="fp32" if args.cpu else "bf16"),
        data=DataConfig(str(folder / "tokens"), tokenizer=str(folder / "tokenizer.model")),
        train=TrainConfig(steps=args.steps, global_batch=2 * dp, lr=args.lr, warmup_steps=1, eps=1e-6),
        save=SaveConfig(every=args.every),
        parallel=ParallelConfig(tp=args.tp, cp=cp, engine=args.engine, timeout_s=args.timeout),
        output=str(folder / "undisturbed"),
    )
    head = 64 if args.hidden >= 512 else 8
    heads = args.hidden // head
    if heads < 2 or args.hidden % (2 * head):
        raise ConfigError(f"--hidden: {args.hidden} is not a multiple of {2 * head}.")
    ffn = args.hidden * 11 // 4 // 16 * 16
    arch = replace(llama2("7b", args.layers), hidden=args.hidden, ffn=ffn, heads=heads, kv_heads=heads // 2)
    arch = replace(arch, head_dim=head, vocab=args.vocab, max_positions=args.sequence)
    write_files(config, config_json(arch))
    return config, halved


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = Parser("tools.bench.survive", __doc__, "BENCHES.md")
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="ranks, a GPU each; even")
    parser.add_argument("--output", type=user_path, required=True, help="a new folder for everything")
    parser.add_argument("--cpu", action="store_true", help="CPU processes, fp32")
    parser.add_argument("--engine", choices=("megatron", "zero3"), default="megatron")
    add_integers(
        parser,
        ("--tp", 1, "tensor-parallel ranks, kept"),
        ("--cp", 2, "context-parallel ranks, halved if dp cannot be"),
        ("--layers", 8, "of the model"),
        ("--hidden", 1024, "width of the model"),
        ("--vocab", 32000, "rows of its embedding, which trains and is most of a checkpoint"),
        ("--sequence", 8192, "tokens a sequence"),
        ("--steps", 14, "optimizer steps"),
        ("--every", 3, "optimizer steps between checkpoints"),
        ("--seed", 0, "of ranks, steps and instants"),
    )
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate (default 5e-3)")
    parser.add_argument("--timeout", type=float, default=180.0, metavar="S", help="seconds for each of the jobs")
    parser.add_argument("--json", type=user_path, help="append the cases here, one line each")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 or 2; see the module."""
    args = parse(argv)
    folder, began = args.output.resolve(), time.monotonic()
    try:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"--output: {folder} is not empty; give a new folder.")
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(args, folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    limit, grid = LIMIT[bench.dtype], bench.config.parallel
    title = (
        f"{args.processes} {'CPU processes' if args.cpu else 'GPUs'}, engine {args.engine}, tp {grid.tp} cp {grid.cp}, "
        f"hidden {args.hidden}, {args.layers} layers, {args.sequence} tokens, {bench.dtype}; seed {args.seed}"
    )
    cases: list[Case] = []
    failed = False
    print(title, flush=True)
    try:
        bench.reference()
        print(
            f"undisturbed: loss {bench.losses[1]:.4f} to {bench.losses[args.steps]:.4f} in {args.steps} steps of "
            f"{bench.step_s:.2f} s, saved in {bench.save_s:.2f} s; allowed difference {limit:g}",
            flush=True,
        )
        for saving in (False, True):
            cases.append(bench.case(saving))
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps({"title": title, "limit": limit, **asdict(cases[-1])}) + "\n")
    except LongspanError as error:
        print(f"FAIL: {error}", file=sys.stderr)
        failed = True
    table = Table()
    for column in ("killed", "rank", "at step", "ended after", "exit code", "left behind", "resumed from", "ranks"):
        table.add_column(column)
    table.add_column("largest difference")
    for case in cases:
        values = (case.rank, case.at_step, f"{case.seconds:.1f} s", case.code, case.left or "-", case.resumed)
        table.add_row(case.name, *map(str, values), str(case.ranks), f"{case.worst:.1e}")
    if cases:
        console_of(140).print(table)
    print(f"{time.monotonic() - began:.0f} s in all")
    for case in cases:
        for problem in case.problems:
            print(f"FAIL: killed {case.name}: {problem}", file=sys.stderr)
    return 1 if failed or any(case.problems for case in cases) else 0


if __name__ == "__main__":
    # As an exception, so that the job under way, in a session of its own, does not outlive this program.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGTERM_CODE))
    sys.exit(main())
