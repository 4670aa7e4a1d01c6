"""Documents held out by their text: every one on one side, copies together, the same whatever lies around them."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.errors import DataError
from pipeline.data import records
from pipeline.data.held_out import Part
from pipeline.data.overlap import shared_text
from pipeline.data.prepare import prepare
from pipeline.data.shards import TokenShards, open_shards
from pipeline.data.tokenizer import load_tokenizer
from tests.support.data_helpers import BYTES
from tests.support.tiny_models import write_tokenizer
from tools import prepare_data


def texts_of(shards: TokenShards) -> list[str]:
    edges = [*shards.starts.tolist(), len(shards)]
    return [BYTES.decode(shards.read(a, b).tolist()) for a, b in zip(edges, edges[1:], strict=False)]


def write_lines(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def halves(source: Path, out: Path, share: float) -> tuple[list[str], list[str]]:
    for held_out in (False, True):
        prepare(source, out / str(held_out), BYTES, part=Part(share, held_out))
    return texts_of(open_shards(out / "False")), texts_of(open_shards(out / "True"))


def test_every_document_is_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_CHUNK", 64)  # long documents in pieces, some of which begin alike
    rng = random.Random(0)
    texts = [f"{rng.random()} " * rng.randrange(1, 40) for _ in range(600)]
    texts = [*texts, *texts[:50], ""]
    kept, held = halves(write_lines(tmp_path / "a.jsonl", texts), tmp_path, 0.2)
    assert sorted(kept + held) == sorted(text for text in texts if text)
    assert not set(kept) & set(held), "copies are together"
    assert kept == [text for text in texts if text in set(kept)], "in their order"
    assert abs(len(held) / 650 - 0.2) < 0.05
    # By the definition: the first 64 characters' hash, as a fraction.
    for text in texts[:600]:
        fraction = int(hashlib.blake2b(text[:64].encode(), digest_size=8).hexdigest(), 16) / 2**64
        assert (text in set(held)) == (fraction < 0.2)
    # Others before and after them move none.
    more = [f"new {number}" for number in range(99)]
    kept_now, held_now = halves(write_lines(tmp_path / "a.jsonl", [*more[:40], *texts, *more[40:]]), tmp_path, 0.2)
    assert set(kept) <= set(kept_now) and set(held) <= set(held_now)


def test_two_sides_of_a_split_share_nothing_but_files(tmp_path: Path) -> None:
    """Of unequal shares they do share documents, which the files' content tells."""
    rng = random.Random(1)
    source = write_lines(tmp_path / "a.jsonl", [" ".join(str(rng.random()) for _ in range(30)) for _ in range(60)])
    sides = {}
    for part in (Part(0.2), Part(0.2, held_out=True), Part(0.5, held_out=True)):
        prepare(source, tmp_path / part.name, BYTES, part=part)
        sides[part.name] = open_shards(tmp_path / part.name, BYTES)
    assert shared_text(sides["but for 0.2"], sides["held out 0.2"]) == ""
    assert "1 of its 1 file is among the training text" in shared_text(sides["but for 0.2"], sides["held out 0.5"])


def test_a_side_does_not_depend_on_the_form(tmp_path: Path) -> None:
    """Long documents come in pieces whose sizes differ between plain text and JSON lines."""
    rng = random.Random(2)
    texts = ["".join(chr(0x4E00 + rng.randrange(500)) for _ in range(100_000)) for _ in range(12)]
    (tmp_path / "plain").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "plain" / f"{number:02}.txt").write_text(text)
    lines = write_lines(tmp_path / "a.jsonl", texts)
    first, second = (
        prepare(source, tmp_path / f"out-{source.name}", BYTES, part=Part(0.5)).documents
        for source in (tmp_path / "plain", lines)
    )
    assert first == second and 0 < first < len(texts)


def test_a_part_is_part_of_what_is_reused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [f"text {number}" for number in range(50)])
    counts = [prepare(source, tmp_path / "out", BYTES, part=part).documents for part in (Part(), Part(0.3), Part(0.4))]
    assert counts[0] == 50 > counts[1] >= counts[2] > 0
    record = json.loads((tmp_path / "out/manifest.json").read_text())
    assert record["part"] == "but for 0.4"
    with pytest.raises(DataError, match="of its 50 documents none falls to the held-out part with a share of 1e-09"):
        prepare(source, tmp_path / "none", BYTES, part=Part(1e-9, held_out=True))


def test_the_command_writes_two_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    source = write_lines(tmp_path / "a.jsonl", [f"text {number}" for number in range(80)])
    call = ["--input", str(source), "--output", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "model")]
    assert prepare_data.main([*call, "--held-out", "0.25"]) == 0
    manifests = [open_shards(tmp_path / "out" / name).manifest for name in ("train", "validation")]
    assert sum(manifest.documents for manifest in manifests) == 80 and manifests[1].documents < 40
    told = capsys.readouterr().out
    assert f"{tmp_path}/out/train: " in told and f"{tmp_path}/out/validation: {manifests[1].tokens} tokens" in told
    assert prepare_data.main([*call, "--held-out", "0.25"]) == 0
    assert capsys.readouterr().out.count("up to date, reused") == 2
    assert prepare_data.main([*call[:2], "--output", str(tmp_path / "whole"), *call[4:]]) == 0
    assert prepare_data.main([*call[:2], "--output", str(tmp_path / "whole"), *call[4:], "--held-out", "0.1"]) == 2
    assert "whole: holds prepared tokens, not the two parts of a split" in capsys.readouterr().err
    for wrong in ("0", "1", "x"):
        with pytest.raises(SystemExit):
            prepare_data.main([*call, "--held-out", wrong])
        assert "--held-out: must be a share between 0 and 1" in capsys.readouterr().err


def test_conversations_are_split_too(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    rows = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(60)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    call = ["--input", str(tmp_path / "a.json"), "--output", str(tmp_path / "out"), "--tokenizer"]
    call += [str(tmp_path / "model"), "--chat", "--chat-template", str(tmp_path / "t.jinja"), "--held-out", "0.3"]
    assert prepare_data.main(call) == 0
    sides = [open_shards(tmp_path / "out" / name) for name in ("train", "validation")]
    found = [set(tokenizer.decode(store.read(0, len(store)).tolist()).split("|")) for store in sides]
    assert not found[0] & found[1] - {""} and sum(store.manifest.documents for store in sides) == 60
    assert 5 < sides[1].manifest.documents < 35 and all(np.any(store.scored) for store in sides)


@pytest.mark.parametrize("stops", [False, True])
def test_both_halves_are_replaced_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool) -> None:
    """A share of which nothing falls to one side, or a second half that is interrupted, leaves what there was."""
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    source = write_lines(tmp_path / "a.jsonl", [f"text {number}" for number in range(80)])
    out = tmp_path / "out"
    call = ["--input", str(source), "--output", str(out), "--tokenizer", str(tmp_path / "model"), "--held-out"]
    real = prepare_data._text

    def fail() -> None:
        def interrupted(*args: Any) -> Any:
            if args[-1].held_out:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            if stops:
                patch.setattr(prepare_data, "_text", interrupted)
            assert prepare_data.main([*call, "0.4" if stops else "1e-9"]) == (130 if stops else 2)

    def held() -> dict[str, bytes]:
        files = (file for file in out.rglob("*") if file.is_file() and file.suffix != ".lock")
        return {str(file.relative_to(out)): file.read_bytes() for file in files}

    fail()
    assert not held(), "one half alone is none"
    assert prepare_data.main([*call, "0.25"]) == 0
    before = held()
    assert {name.partition("/")[0] for name in before} == {"train", "validation"}
    fail()
    assert held() == before
    for name in ("train", "validation"):  # as a killed process of an earlier version left them
        (out / name).rename(out / f".{name}.aside-12345678")
    shutil.copytree(out / ".validation.aside-12345678", out / "train")
    (out / ".train.aside-abcd1234").mkdir()
    fail()
    assert held() == before
    assert prepare_data.main([*call, "0.4"]) == 0
    parts = [open_shards(out / name).manifest.part for name in ("train", "validation")]
    assert parts == ["but for 0.4", "held out 0.4"]
    (out / "train").rename(out / ".train.aside-12345678")
    shutil.copytree(out / ".train.aside-12345678", out / "train")
    assert prepare_data.main([*call, "0.4"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [".train.lock", ".validation.lock", "train", "validation"]


def test_what_is_not_ours_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    (tmp_path / "out/validation").mkdir(parents=True)
    (tmp_path / "out/validation/thesis.tex").write_text("years of work")
    source = write_lines(tmp_path / "a.jsonl", [f"text {number}" for number in range(80)])
    call = ["--input", str(source), "--output", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "model")]
    assert prepare_data.main([*call, "--held-out", "0.25"]) == 2
    assert "out/validation: exists and holds something else than prepared tokens" in capsys.readouterr().err
    assert (tmp_path / "out/validation/thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "out/train").exists()
