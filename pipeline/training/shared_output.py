"""Do all machines of a job see the same output folder? Asked at the start: a checkpoint is of all ranks' files."""

from __future__ import annotations

import os
import secrets
import socket
import time
from pathlib import Path

from parallel.errors import ConfigError
from parallel.world.collectives import agree, share_from_main
from parallel.world.groups import Groups

WAIT_S = 20.0
"""A network file system may show a new file so late."""
POLL_S = 0.2


def check_shared(groups: Groups, folder: Path) -> None:
    """Rank 0 writes a token into the folder and every rank reads it; collective.

    Raises:
        ConfigError: a rank does not find it; the same sentence on every rank.
    """
    if groups.plan.world_size == 1 or groups.fake:
        return

    def write() -> str:
        path = folder / f".shared-{secrets.token_hex(8)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(path.name)
        except OSError as error:
            raise ConfigError(
                f"output: {folder} cannot be written ({error.strerror or error}); free space or fix permissions, or "
                "choose another output."
            ) from None
        return f"{path.name} {socket.gethostname()}"

    name, _, host = share_from_main(groups, write).partition(" ")
    failure = None if _appears(folder / name, name) else f"on {socket.gethostname()}"
    _, failed = agree(groups, [0], failure)
    if groups.is_main:
        (folder / name).unlink(missing_ok=True)
    if failed is not None:
        who = (failed if failed.startswith("rank") else f"rank {groups.env.rank}: {failed}").replace(": ", " ")
        raise ConfigError(
            f"output: {folder} is not one folder for all ranks: what rank 0 on {host} wrote there, {who} does not see; "
            "set output to a folder on a file system that all machines share, by the same path."
        )


def _appears(path: Path, text: str) -> bool:
    """Whether the file is there with that text, or comes to be in time."""
    end = time.monotonic() + WAIT_S
    while True:
        try:
            # Listing first: it makes a network file system look again.
            os.listdir(path.parent)
            if path.read_text() == text:
                return True
        except OSError:
            pass
        if time.monotonic() >= end:
            return False
        time.sleep(POLL_S)
