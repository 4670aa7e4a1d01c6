"""Train from one YAML, starting the ranks too: `longspan train --config run.yaml --nproc 8`; the same command resumes.

Without --nproc this process is one rank, which torchrun, srun or mpirun may have started, or the only one. With it, the
machine is checked (`longspan preflight`) and N processes are started, one a GPU. On several machines start it once on
each: with srun --ntasks-per-node=1, or with --nnodes, --node-rank and --master-addr.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from parallel.errors import ConfigError
from pipeline.config.paths import user_path
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser, whole_number

PORT = 29500
"""Where machines meet unless MASTER_PORT says otherwise; torchrun's default."""
_COUNT, _RANK = re.compile("[1-9][0-9]*"), re.compile("0|[1-9][0-9]*")


@dataclass(frozen=True)
class Machines:
    """Which machine of how many this is, and where they meet."""

    count: int = 1
    rank: int = 0
    head: str = ""
    """Name of machine 0; empty: there is no other."""
    port: str = str(PORT)

    @property
    def arguments(self) -> list[str]:
        """What torchrun is told."""
        if self.count == 1:
            return ["--standalone"]
        where = ["--master-addr", self.head, "--master-port", self.port]
        return ["--nnodes", str(self.count), "--node-rank", str(self.rank), *where]


def first_host(nodes: str) -> str:
    """Name of the first machine of a Slurm list such as `n[4-6]`.

    Raises:
        ConfigError: there is no scontrol to ask, or it does not know.
    """
    if shutil.which("scontrol") is None:
        raise ConfigError(f"no scontrol here to ask for machine 0 of {nodes}; set MASTER_ADDR to its name.")
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    names = done.stdout.split()
    if done.returncode or not names:
        raise ConfigError(
            f"scontrol does not tell machine 0 of {nodes} ({done.stderr.strip()}); set MASTER_ADDR to its name."
        )
    return names[0]


def read_machines(environment: Mapping[str, str], host: Callable[[str], str] = first_host) -> Machines:
    """The machines of NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT; what is not set, of srun's variables.

    Args:
        host: names the first machine of a Slurm list.

    Raises:
        ConfigError: they contradict each other, or something is not known.
    """
    get = environment.get
    nodes = get("NNODES") or get("SLURM_STEP_NUM_NODES") or get("SLURM_NNODES") or "1"
    rank = get("NODE_RANK") or ""
    if not _COUNT.fullmatch(nodes):
        raise ConfigError(f"NNODES must be a number of machines, 1 or more, got '{nodes}'.")
    if get("SLURM_LOCALID", "0") != "0":
        raise ConfigError("srun started it more than once on a machine; use srun --ntasks-per-node=1.")
    count = int(nodes)
    if count > 1:
        # There it would start on the first machine only, and wait for the others.
        if get("SLURM_JOB_ID") and not get("SLURM_STEP_ID") and not rank:
            raise ConfigError(
                f"the job has {nodes} machines and this is one of them; start it with srun --ntasks-per-node=1, or set "
                "NNODES=1."
            )
        rank = rank or get("SLURM_NODEID") or ""
        if not rank:
            raise ConfigError(f"NNODES is {nodes} but NODE_RANK is not set; number the machines from 0.")
    rank = rank or "0"
    if not _RANK.fullmatch(rank) or int(rank) >= count:
        raise ConfigError(f"NODE_RANK must be a number below NNODES, which is {nodes}; got '{rank}'.")
    if count == 1:
        return Machines()
    head = get("MASTER_ADDR") or ""
    listed = get("SLURM_STEP_NODELIST") or get("SLURM_JOB_NODELIST") or ""
    if not head and listed:
        head = host(listed)
    if not head:
        raise ConfigError(f"NNODES is {nodes} but MASTER_ADDR is not set; give the name of machine 0.")
    return Machines(count, int(rank), head, get("MASTER_PORT") or str(PORT))


def prepare_environment(processes: int, cpu: bool) -> None:
    """Set, where the user has not, what the processes need before they import anything."""
    # torchrun would give every process one thread, and the optimizer's share in host memory is updated by the CPU.
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # Segments that grow leave no gaps between layers' tensors, which the allocator would have to flush to use.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = Parser("tools.launch", __doc__, "LAUNCH.md")
    parser.add_argument("--config", type=user_path, required=True, help="YAML of the run")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting; repeatable")
    parser.add_argument("--stop-after", type=whole_number(), help="stop (saved) after N optimizer steps")
    parser.add_argument("--nproc", type=whole_number(), help="start N processes on this machine, one a GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: processes without a GPU")
    parser.add_argument("--profile", type=whole_number(), nargs="?", const=0, help="record the Nth step from here")
    machines = parser.add_argument_group("several machines (or NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT)")
    machines.add_argument("--nnodes", metavar="M", help="how many there are")
    machines.add_argument("--node-rank", metavar="R", help="which of them this is, from 0")
    machines.add_argument("--master-addr", metavar="HOST", help="name of machine 0")
    machines.add_argument("--master-port", metavar="PORT", help=f"where they meet there (default {PORT})")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: the trainer's, or 2 when something is missing or the configuration is wrong."""
    args = parse(argv)
    run = ["--config", str(args.config), *(word for text in args.set for word in ("--set", text))]
    rest = [] if args.stop_after is None else ["--stop-after", str(args.stop_after)]
    if args.profile is not None:
        rest += ["--profile", *([str(args.profile)] if args.profile else ())]
    given = {
        "NNODES": args.nnodes,
        "NODE_RANK": args.node_rank,
        "MASTER_ADDR": args.master_addr,
        "MASTER_PORT": args.master_port,
    }
    given = {name: text for name, text in given.items() if text is not None}
    if args.nproc is None:
        if given:
            raise ConfigError("--nproc: missing; say how many processes each of the machines starts.")
        if args.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from pipeline.train import main as train

        return train([*run, *rest])
    machines = read_machines({**os.environ, **given})
    cpu = args.device == "cpu"
    prepare_environment(args.nproc, cpu)
    if not cpu:
        # In a process of its own: what it opens on the GPUs would stay there beside the ranks.
        check = [*run, "--nproc", str(args.nproc), "--nnodes", str(machines.count)]
        code = subprocess.run([sys.executable, "-W", "ignore", "-m", "tools.preflight", *check]).returncode
        if code:
            return code
    from tools.torchrun import main as torchrun

    return torchrun([*machines.arguments, "--nproc-per-node", str(args.nproc), "-m", "pipeline.train", *run, *rest])


if __name__ == "__main__":
    sys.exit(main())
