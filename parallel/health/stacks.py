"""What a rank was doing when the job ended without a cause of its own: its Python stacks and its last collectives.

Both are written by the thread that watches, since the main thread of a rank that hangs runs nothing any more. The
collectives are those of torch's flight recorder, which always keeps the last of them (2000, unless
TORCH_NCCL_TRACE_BUFFER_SIZE says otherwise); torch's own `torchfrtrace` compares those of several ranks. Where py-spy
is installed it writes the stacks once more with the frames of compiled code, which tell a launch of a kernel from a
wait of NCCL's.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import torch

from parallel.health.verdict import Verdict

FOLDER = "hang"
"""Below a run's output."""
WRITE_S = 2.0
"""Seconds it may take: a stuck disk or driver must not keep the job from ending."""
NATIVE_S = 5.0
"""Seconds for py-spy on top of it: it reads the symbols of every library of the process."""
_PR_SET_PTRACER = 0x59616D61
"""prctl's: who may trace this process, where Linux's Yama lets only a parent do so. 0: nobody, -1: anybody."""
_RECORDERS = {"nccl": "_dump_nccl_trace_json", "gloo": "_dump_fr_trace_json"}


def pending(trace: str) -> str:
    """The collective that a recorder's JSON shows to be entered and not ended, of the oldest; empty: none.

    Source: torch/csrc/distributed/c10d/FlightRecorder.hpp, whose watchdog retires what has ended.
    """
    for entry in json.loads(trace).get("entries", []):
        if not entry["retired"]:
            group = " ".join(dict.fromkeys(part for part in entry["process_group"] if part))
            where = "p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"
            return f"{entry['profiling_name']} (number {entry[where]} of process group {group})"
    return ""


def native_stacks(program: str, seconds: float) -> str:
    """What `py-spy dump --native` says of this process, or why it says nothing.

    Args:
        program: path of py-spy.
    """
    process, libc = str(os.getpid()), ctypes.CDLL(None)
    libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
    try:
        words = [program, "dump", "--native", "--pid", process]
        done = subprocess.run(words, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program}: {error}\n"
    finally:
        libc.prctl(_PR_SET_PTRACER, 0, 0, 0, 0)
    return (done.stdout if done.returncode == 0 else done.stderr).decode(errors="replace")


class StackWriter:
    """Writes `rank-N.txt` and, where collectives were recorded, `rank-N-<backend>.json` into a folder, in time; with
    py-spy on PATH `rank-N-native.txt` too.

    Args:
        folder: made if missing; a file that is there is replaced.
        rank: this one's.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self._waits, self._written = "", False
        self._spy = shutil.which("py-spy")

    def write(self) -> str:
        """Do it; returns the end of a sentence that says where, and in what this rank waits. Empty: it could not."""
        # A thread of its own, which the main thread need not run for; what it has not done in time is left out.
        worker = threading.Thread(target=self._write, name="longspan-stacks", daemon=True)
        worker.start()
        worker.join(WRITE_S + (NATIVE_S if self._spy else 0))
        if not self._written:
            return ""
        waits = f"rank {self.rank} waits in {self._waits}; " if self._waits else ""
        return f"; {waits}the Python stacks and last collectives of every rank are in {self.folder}"

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank-{self.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            self._written = True
            for backend, name in _RECORDERS.items():
                dump = getattr(torch._C._distributed_c10d, name, None)  # private, and absent from some builds
                trace = "" if dump is None else dump(True, False).decode(errors="replace")
                if '"entries"' in trace:
                    (self.folder / f"rank-{self.rank}-{backend}.json").write_text(trace)
                    self._waits = self._waits or pending(trace)
            # Last, since it may take long, and stops this process meanwhile.
            if self._spy is not None:
                (self.folder / f"rank-{self.rank}-native.txt").write_text(native_stacks(self._spy, NATIVE_S))


def with_stacks(verdict: Verdict, writer: StackWriter | None) -> Verdict:
    """The verdict, with where to look on, if ranks were lost or hang; one who failed has told why."""
    if writer is None or verdict.detail or verdict.code != 1:
        return verdict
    return replace(verdict, text=verdict.text + writer.write())
