"""Two machines of their own networks, as root: `python -m tests.integration.two_machines [CASE ...]`; not a test.

Each is a network namespace with one address, a name and a file of hosts of its own, joined by a virtual cable; they
share the disk, as machines share a file system. On each `launch/run.sh` starts two CPU ranks. Prints a line a case with
what was seen and how long it took, and leaves with 1 if something was not as docs/STATE.md and docs/LAUNCH.md say.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.numerics.test_training import write_run

ROOT = Path(__file__).parents[2]
NAMES, ADDRESSES = ("longspan-a", "longspan-b"), ("10.77.0.1", "10.77.0.2")
TIMEOUT_S = 45
"""parallel.timeout_s: how long silence may last."""
SAVED = 75
RANKS = 2


def ip(*words: str) -> None:
    """One command of iproute2."""
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def machines() -> Iterator[None]:
    """The two namespaces and the cable between them; all gone afterwards."""
    with contextlib.ExitStack() as cleanup:
        for name in NAMES:
            ip("netns", "add", name)
            cleanup.callback(ip, "netns", "del", name)
            cleanup.callback(subprocess.run, f"ip netns pids {name} | xargs -r kill -KILL", shell=True, check=True)
        ip("link", "add", "cable-a", "netns", NAMES[0], "type", "veth", "peer", "name", "cable-b", "netns", NAMES[1])
        for name, address, end in zip(NAMES, ADDRESSES, ("cable-a", "cable-b"), strict=True):
            etc = Path("/etc/netns") / name
            etc.mkdir(parents=True)
            cleanup.callback(subprocess.run, ["rm", "-r", str(etc)], check=True)
            lines = ["127.0.0.1 localhost", *(f"{a} {n}" for a, n in zip(ADDRESSES, NAMES, strict=True))]
            (etc / "hosts").write_text("\n".join(lines) + "\n")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")
        yield


def cable(up: bool) -> None:
    """Put the cable in, or pull it."""
    ip("-n", NAMES[1], "link", "set", "cable-b", "up" if up else "down")


class Job:
    """launch/run.sh on one of the machines."""

    def __init__(self, number: int, config: Path, *settings: str) -> None:
        self.log = config.with_name(f"log-{time.monotonic_ns()}-{number}")
        words = [word for setting in settings for word in ("--set", setting)]
        launch = ["bash", str(ROOT / "launch/run.sh"), str(config), "--nproc", str(RANKS), "--device", "cpu", *words]
        # A machine has a name of its own too, which is what gloo looks up.
        named = ["unshare", "--uts", "bash", "-c", 'hostname "$0" && exec "$@"', NAMES[number], *launch]
        environment = os.environ | {
            "NNODES": "2",
            "NODE_RANK": str(number),
            "MASTER_ADDR": NAMES[0],
            "LONGSPAN_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", NAMES[number], *named],
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def text(self) -> str:
        """What it said."""
        return self.log.read_text(errors="replace")

    def last(self) -> str:
        """Its last line."""
        return (self.text().strip().splitlines() or [""])[-1]

    def kill(self) -> None:
        """The machine is gone, without a word."""
        subprocess.run(f"ip netns pids {NAMES[self.number()]} | xargs -r kill -KILL", shell=True, check=True)

    def number(self) -> int:
        """Which machine it is."""
        return int(self.log.name[-1])


def both(config: Path, *settings: str) -> list[Job]:
    """The run on both machines."""
    return [Job(number, config, *settings) for number in (0, 1)]


def codes(jobs: list[Job], within_s: float = 120) -> list[int | None]:
    """Exit codes once all have ended; None: it did not, and was killed."""
    until, found = time.monotonic() + within_s, list[int | None]()
    for job in jobs:
        try:
            found.append(job.process.wait(max(0.1, until - time.monotonic())))
        except subprocess.TimeoutExpired:
            found.append(None)
    for job, code in zip(jobs, found, strict=True):
        if code is None:
            job.kill()
            job.process.wait()
    return found


def steps(output: Path) -> int:
    """Steps that are recorded."""
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(what: Callable[[], bool], within_s: float = 120) -> None:
    """Return once it is so; TimeoutError: it never was."""
    until = time.monotonic() + within_s
    while not what():
        if time.monotonic() > until:
            raise TimeoutError("waited in vain")
        time.sleep(0.02)


def told(case: str, began: float, seen: str, good: bool, jobs: list[Job]) -> bool:
    """Print a case's line; what the jobs said, if it went wrong."""
    print(f"{'ok' if good else 'WRONG'}  {case}: {seen}, {time.monotonic() - began:.1f} s", flush=True)
    if not good:
        for job in jobs:
            print(f"--- {NAMES[job.number()]}\n{job.text()}", flush=True)
    return good


def train_to_the_end(folder: Path) -> bool:
    """Four ranks on two machines compute what they compute on one."""
    config, alone = write_run(folder, "apart"), write_run(folder, "together")
    began, jobs = time.monotonic(), both(config)
    found = codes(jobs)
    took = time.monotonic()
    words = [sys.executable, "-m", "tools.launch", "--config", str(alone), "--nproc", "4", "--device", "cpu"]
    subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    losses = [
        [json.loads(line)["loss"] for line in (folder / n / "metrics.jsonl").open()] for n in ("apart", "together")
    ]
    good = found == [0, 0] and losses[0] == losses[1] and len(losses[0]) == 6
    began += time.monotonic() - took
    return told("trained to the end", began, f"codes {found}, losses equal to one machine's to the bit", good, jobs)


def signal_while_training(folder: Path) -> bool:
    """SIGTERM to one machine's launcher saves on both at one step; the same command resumes."""
    config, output = write_run(folder, "signal"), folder / "signal"
    settings = "train.steps=5000", "save.every=0", f"save.signal_exit_code={SAVED}"
    jobs = both(config, *settings)
    wait_for(lambda: steps(output) >= 3)
    began = time.monotonic()
    jobs[1].process.send_signal(signal.SIGTERM)
    found, done = codes(jobs), steps(output)
    good = found == [SAVED, SAVED] and f"stopped and saved at step {done}" in jobs[0].text()
    good = told("SIGTERM to b while training", began, f"codes {found}, saved at step {done}", good, jobs)
    began, jobs = time.monotonic(), both(config, f"train.steps={done + 2}", *settings[1:])
    found = codes(jobs)
    resumed = found == [0, 0] and f"resumed at step {done}" in jobs[0].text() and steps(output) == done + 2
    return told("the same command", began, f"codes {found}, resumed at step {done}", resumed, jobs) and good


def signal_while_loading(folder: Path, number: int) -> bool:
    """There is nothing to save: that machine ends at once with 143, the other within the time-out, with a sentence."""
    config, output = write_run(folder, f"loading-{number}"), folder / f"loading-{number}"
    jobs = both(config, f"parallel.timeout_s={TIMEOUT_S}")
    # The lock is taken while the run is being composed, before any step.
    wait_for(lambda: (output / ".lock").exists())
    began = time.monotonic()
    jobs[number].process.send_signal(signal.SIGTERM)
    own = jobs[number].process.wait(60)
    at_once = time.monotonic() - began
    found = codes(jobs, 60 + 2 * TIMEOUT_S)
    other = jobs[1 - number]
    good = own == 128 + signal.SIGTERM and found[1 - number] not in (0, SAVED, None) and steps(output) == 0
    seen = f"it left with {own} after {at_once:.1f} s, the other with {found[1 - number]}: {other.last()}"
    good = told(f"SIGTERM to {'ab'[number]} while loading", began, seen, good, jobs)
    began, jobs = time.monotonic(), both(config)
    found = codes(jobs, 200)
    return told("the same command", began, f"codes {found}, {steps(output)} steps", found == [0, 0], jobs) and good


def lost(folder: Path, case: str, fault: Callable[[list[Job]], None], mended: Callable[[], None]) -> bool:
    """The other machine ends within the time-out with a sentence; the same command goes on from the last save."""
    name = case.partition(":")[0]
    config, output = write_run(folder, name), folder / name
    settings = f"parallel.timeout_s={TIMEOUT_S}", "save.every=2"
    jobs = both(config, "train.steps=5000", *settings)
    wait_for(lambda: steps(output) >= 7 or any(job.process.poll() is not None for job in jobs))
    began = time.monotonic()
    fault(jobs)
    found = codes(jobs, 60 + 2 * TIMEOUT_S)
    took = time.monotonic() - began
    said = [line for line in jobs[0].text().splitlines() if line.startswith("error: ")]
    good = 0 not in found and None not in found and took < 2 * TIMEOUT_S and bool(said)
    good = told(case, began, f"codes {found}: {(said or [''])[-1]}", good, jobs)
    mended()
    saved = max(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*"))
    began, jobs = time.monotonic(), both(config, f"train.steps={saved + 2}", *settings)
    found = codes(jobs, 300)
    resumed = found == [0, 0] and f"resumed at step {saved}" in jobs[0].text()
    return told("the same command", began, f"codes {found}, resumed at step {saved}", resumed, jobs) and good


def main() -> int:
    """Exit code 0 if everything was as documented."""
    if os.geteuid():
        print("two_machines: network namespaces need root.", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    with tempfile.TemporaryDirectory(prefix="longspan-machines-") as name, machines():
        folder = Path(name)
        cases: dict[str, Callable[[], bool]] = {
            "end": lambda: train_to_the_end(folder),
            "signal": lambda: signal_while_training(folder),
            "loading-b": lambda: signal_while_loading(folder, 1),
            "loading-a": lambda: signal_while_loading(folder, 0),
            "killed": lambda: lost(folder, "killed: machine b", lambda jobs: jobs[1].kill(), lambda: None),
            "cable": lambda: lost(folder, "unplugged: the cable", lambda jobs: cable(False), lambda: cable(True)),
        }
        results = [cases[case]() for case in sys.argv[1:] or cases]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
