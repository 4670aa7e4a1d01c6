"""torchrun whose signals reach the trainer: `python -m tools.torchrun --nproc-per-node 8 -m pipeline.train --config C`

It takes torchrun's arguments and is what launch/run.sh starts. torchrun alone dies of SIGUSR1, ends its processes 30 s
after SIGTERM or Ctrl-C whether they have saved or not, makes a 1 of every exit code, and buries a rank's sentence under
a traceback of its own. Exit code: 0; `save.signal_exit_code` after SIGTERM or SIGUSR1, and 130 after Ctrl-C, once the
state is saved; 128 + the signal that ended it with nothing to save, or 130 after a second Ctrl-C; otherwise that of the
first process that failed.

What NCCL is told is in launch/nccl.env; variables that are set already win over it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from parallel.health.signals import AT_ONCE, INTERRUPT_CODE, SAVING, SIGNALS, end_at_once, stop_name, tell
from parallel.world.rank_env import EXIT_FILE
from pipeline.reporting.command import TOLD, command
from tools.support.nccl import nccl_file, nccl_settings

if TYPE_CHECKING:  # it imports torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def say(text: str) -> None:
    """One line on standard error, in one write: the processes share it."""
    os.write(2, f"launcher: {text}\n".encode())


class Forwarder:
    """Passes the first of SIGNALS on to this process's children, from a thread; a second Ctrl-C ends them.

    The main thread may stand in a call of torch's that waits for other machines, and runs no Python handler; the byte
    in the pipe arrives at once. Other later signals say nothing new, and might meet a process that has saved and is
    leaving. A terminal's Ctrl-C reaches only the launcher: its children have sessions of their own.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal passed on; 0: none."""
        self._interrupts = 0
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            # nohup, and a shell's `&`, make deaf to Ctrl-C, which shall stay so.
            if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._run, name="longspan-signals", daemon=True).start()

    def _run(self) -> None:
        while True:
            for number in os.read(self._read, 4096):
                self._interrupts += number == signal.SIGINT
                if self._interrupts > 1:
                    tell(AT_ONCE)
                    end_at_once(INTERRUPT_CODE)
                if number in SIGNALS and not self.number:
                    self._forward(number)
                elif number == signal.SIGINT:
                    say(f"{stop_name(self.number)} came before: already stopping; Ctrl-C once more ends it at once.")

    def _forward(self, number: int) -> None:
        workers = psutil.Process().children()
        if not workers:
            say(f"{stop_name(number)}: no process is at work, nothing is to be saved.")
            os._exit(128 + number)
        self.number = number
        if number == signal.SIGINT:
            tell(SAVING)
        for worker in workers:
            with contextlib.suppress(psutil.Error):
                worker.send_signal(number)

    def failed(self, error: ChildFailedError) -> int:
        """The exit code of a failed job; tells what its processes cannot have told."""
        codes = {failure.exitcode for failure in error.failures.values()}
        # A rank that had not begun when the signal came is ended by torchrun, once another was ended by it.
        if self.number and codes - {-signal.SIGTERM} <= {-self.number, 128 + self.number}:
            say(
                f"{stop_name(self.number)} came before the first step or after the last: nothing was to be saved; "
                "rerun the same command to go on."
            )
            return 128 + self.number
        rank, first = error.get_first_failure()
        if first.exitcode < 0:
            say(f"rank {rank} (process {first.pid}) was ended by {signal.Signals(-first.exitcode).name}.")
            return 128 - first.exitcode
        if first.exitcode != TOLD:
            say(f"rank {rank} left with code {first.exitcode}; what it said of it is above.")
        return first.exitcode


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: see the module."""
    # Until there are processes to end, at once: not when torch's rendezvous returns to Python.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Seconds, in which a signal still ends it.
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    from parallel.world.meeting import cannot_meet, refuse_unknown_host

    args = parse_args(argv)
    for name, value in nccl_settings(nccl_file()).items():
        os.environ.setdefault(name, value)
    if args.standalone:
        # Else it is the host's name, which need not resolve, that the processes are to meet at.
        args.local_addr = args.local_addr or "127.0.0.1"
    elif args.rdzv_backend == "static" and args.master_addr:
        refuse_unknown_host(args.master_addr, "launcher")
    # Ended without a save, as by torchrun. It would undo what nohup did.
    ending = ["SIGQUIT"] + (["SIGHUP"] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])
    args.signals_to_handle = ",".join(ending)
    # "Sending process ... closing signal" and "failed (exitcode: ...)", after the sentence that says why.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    with tempfile.NamedTemporaryFile("r", prefix="longspan-exit-") as file:
        os.environ[EXIT_FILE] = file.name
        forwarder = Forwarder()
        try:
            run(args)
        except ChildFailedError as error:
            return forwarder.failed(error)
        except SignalException as error:
            return 128 + error.sigval
        except (DistError, RendezvousError) as error:
            where = (args.master_addr, args.master_port)
            if args.rdzv_endpoint:
                where = args.rdzv_endpoint.rpartition(":")[::2]
            say(cannot_meet(*where, error, hosting=not args.node_rank))
            return TOLD
        # By its name: whoever cleaned temporary folders meanwhile, a process has made it again.
        path = Path(file.name)
        return int((path.read_text() if path.is_file() else "") or 0)


if __name__ == "__main__":
    sys.exit(main())
