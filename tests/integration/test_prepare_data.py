"""tools.prepare_data as a user runs it: what is written, what is reused, and what an interruption leaves."""

from __future__ import annotations

import fcntl
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sentencepiece

from parallel.errors import DataError
from pipeline.data import prepare as prepare_module
from pipeline.data.prepare import cache_folder, open_text_or_shards, prepare
from pipeline.data.shards import DOCUMENTS, MANIFEST, TokenShards, open_shards
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from tests.support.tiny_models import write_tokenizer
from tools import prepare_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> TextTokenizer:
    return load_tokenizer(model)


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """A sentencepiece model: worker processes load it in a moment, where transformers takes seconds each."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["text of line 1 2 3 4 5 6 7 8 9 0"] * 3),
        model_writer=trained,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file = tmp_path_factory.mktemp("light") / "tokenizer.model"
    file.write_bytes(trained.getvalue())
    return load_tokenizer(file)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("first </s> text")
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(5)))
    (folder / "empty.txt").write_text(" \n")
    (folder / "sub" / "c.txt.xz").write_bytes(lzma.compress(b"packed text"))
    return folder


DOCUMENTS_OF = ["first </s> text", *(f"line {n}" for n in range(5)), "packed text"]


def same(one: TokenShards, other: TokenShards) -> bool:
    return bool(
        len(one) == len(other)
        and (one.read(0, len(one)) == other.read(0, len(other))).all()
        and (one.starts == other.starts).all()
    )


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Inode and bytes of every file: a rewritten folder has other inodes."""
    return {file.name: (file.stat().st_ino, file.read_bytes()) for file in folder.iterdir()}


def run(corpus: Path, out: Path, model: Path, *more: str) -> int:
    return prepare_data.main(["--input", str(corpus), "--output", str(out), "--tokenizer", str(model), *more])


def test_a_folder_of_mixed_text(
    corpus: Path, tmp_path: Path, model: Path, tokenizer: TextTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "tokens"
    assert run(corpus, out, model) == 0
    expected = [token for text in DOCUMENTS_OF for token in [*tokenizer.encode(text), 2]]
    shards = open_shards(out, tokenizer, verify=True)
    assert shards.read(0, len(shards)).tolist() == expected
    assert expected.count(2) == len(shards.starts) == 7  # the text's own "</s>" ends nothing
    assert [(entry.name, entry.size) for entry in shards.manifest.sources] == [
        (name, (corpus / name).stat().st_size) for name in ("a.txt", "b.jsonl", "empty.txt", "sub/c.txt.xz")
    ]
    told = capsys.readouterr()
    ends, count, lengths = told.out.splitlines()
    assert ends.endswith("and ends with token 2")
    assert count == f"{out}: {len(expected)} tokens, 7 documents (1 empty skipped), written"
    assert lengths.startswith("lengths in tokens: ") and lengths.endswith(f"see {out / 'card.md'}")
    spelled = (
        f"1 document spells a special token, which stays the characters it is (first: '</s>' in {corpus / 'a.txt'})"
    )
    assert told.err == f"warning: {spelled}.\n"
    assert run(corpus, out, model) == 0
    assert "7 documents (1 empty skipped), up to date, reused\n" in capsys.readouterr().out
    assert sorted(path.name for path in out.parent.iterdir()) == [".tokens.lock", "tokens"]


def test_unchanged_text_is_not_tokenized_again(corpus: Path, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    cache = tmp_path / "cache"
    first = open_text_or_shards(corpus, cache, tokenizer)
    before = content(first.folder)
    calls: list[int] = []
    again = open_text_or_shards(corpus, cache, tokenizer, progress=lambda *told: calls.append(1))
    assert same(first, again) and not calls
    assert content(first.folder) == before
    os.utime(corpus / "a.txt", ns=(1, 1))  # touched, yet the same text
    open_text_or_shards(corpus, cache, tokenizer)
    assert content(first.folder) == before
    # A prepared folder may be given itself; nothing is cached for it.
    assert same(open_text_or_shards(first.folder, tmp_path / "other", tokenizer), first)
    assert not (tmp_path / "other").exists()


def _same_size(corpus: Path) -> None:
    file = corpus / "a.txt"
    file.write_text(file.read_text().replace("first", "FIRST"))
    os.utime(file, ns=(5, 5))


@pytest.mark.parametrize(
    "change",
    [
        _same_size,
        lambda corpus: (corpus / "a.txt").write_text("longer than it was before"),
        lambda corpus: (corpus / "d.txt").write_text("one more"),
        lambda corpus: (corpus / "a.txt").unlink(),
        lambda corpus: (corpus / "a.txt").rename(corpus / "z.txt"),
    ],
)
def test_changed_text_is_prepared_anew(
    corpus: Path, tmp_path: Path, tokenizer: TextTokenizer, change: Callable[[Path], object]
) -> None:
    old = open_text_or_shards(corpus, tmp_path / "cache", tokenizer)
    tokens = old.read(0, len(old)).tolist()
    change(corpus)
    new = open_text_or_shards(corpus, tmp_path / "cache", tokenizer)
    assert new.folder == old.folder
    assert new.read(0, len(new)).tolist() != tokens
    prepare(corpus, tmp_path / "fresh", tokenizer)
    assert same(new, open_shards(tmp_path / "fresh"))
    assert old.read(0, len(old)).tolist() == tokens  # a run that has it open keeps what it had


@pytest.mark.parametrize("name", ["tokens-00000.bin", DOCUMENTS, MANIFEST])
def test_a_damaged_folder_is_prepared_anew(corpus: Path, tmp_path: Path, tokenizer: TextTokenizer, name: str) -> None:
    prepare(corpus, tmp_path / "out", tokenizer)
    whole = {key: data for key, (_, data) in content(tmp_path / "out").items()}
    (tmp_path / "out" / name).write_bytes(whole[name][:-3])
    prepare(corpus, tmp_path / "out", tokenizer)
    assert {key: data for key, (_, data) in content(tmp_path / "out").items()} == whole


def test_another_tokenizer_or_field_is_prepared_anew(
    corpus: Path, tmp_path: Path, model: Path, tokenizer: TextTokenizer
) -> None:
    (tmp_path / "other").mkdir()
    for file in model.iterdir():
        # Another text to ids: <s>, of which no text makes any, ends documents.
        other_end = file.read_text().replace('"eos_token": "</s>"', '"eos_token": "<s>"')
        (tmp_path / "other" / file.name).write_text(other_end)
    other = load_tokenizer(tmp_path / "other")
    first = prepare(corpus, tmp_path / "out", tokenizer)
    second = prepare(corpus, tmp_path / "out", other)
    assert (first.tokenizer, second.tokenizer) == (tokenizer.fingerprint, other.fingerprint)
    assert open_shards(tmp_path / "out", other)
    (corpus / "b.jsonl").write_text('{"text": "t", "body": "b"}')
    prepare(corpus, tmp_path / "out", other)
    assert prepare(corpus, tmp_path / "out", other, "body").text_field == "body"
    folders = {
        cache_folder(corpus, tmp_path, chosen, field) for chosen in (tokenizer, other) for field in ("text", "body")
    }
    assert len(folders) == 4


def test_several_workers_give_the_order_of_one(
    tmp_path: Path, light: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 40)  # many more batches than the queue holds
    # Later documents are shorter, so that their workers finish sooner.
    texts = [f"{n} " * (1 + 4000 // (n + 1)) for n in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    alone: list[tuple[int, int, int]] = []
    told: list[tuple[int, int, int]] = []
    source = tmp_path / "a.jsonl"
    one = prepare(source, tmp_path / "one", light, progress=lambda *now: alone.append(now))
    two = prepare(source, tmp_path / "two", light, workers=2, progress=lambda *now: told.append(now))
    assert one == two and one.documents == 60
    assert same(open_shards(tmp_path / "one", verify=True), open_shards(tmp_path / "two", verify=True))
    size = source.stat().st_size
    assert told == alone == sorted(told) and len(told) > 20 and told[-1] == (size, size, two.tokens)
    assert told[0] == (0, size, 0) and 0 < told[1][0], "hashed, then tokenized"


def test_an_error_while_workers_are_busy_leaves_nothing(
    tmp_path: Path, light: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 4)
    lines = ['{"text": "fine"}'] * 20 + ["{broken"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="a.jsonl: line 21 is not JSON"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", light, workers=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "a.jsonl"]


def test_a_dead_worker_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")

    class Moved:
        """A tokenizer whose files are gone when the worker looks for them."""

        path = tmp_path / "gone"
        eos_id, bos_id, vocab_size, fingerprint = 2, 1, 300, "moved"

        def encode(self, text: str) -> list[int]:
            raise AssertionError("the worker's own tokenizer encodes")

        def may_cut(self, left: str, right: str) -> bool:
            return False

    with pytest.raises(DataError, match="gone: a tokenizing process died"):
        prepare(tmp_path / "a.txt", tmp_path / "out", Moved(), workers=2)
    assert not (tmp_path / "out").exists()


def test_an_interruption_keeps_the_old_folder_and_leaves_nothing_else(
    corpus: Path, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    def interrupt(done: int, *_: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "out", tokenizer, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "corpus"]
    prepare(corpus, tmp_path / "out", tokenizer)
    before = content(tmp_path / "out")
    (corpus / "a.txt").write_text("changed")
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "out", tokenizer, progress=interrupt)
    assert content(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "corpus", "out"]


KILLED = """
import sys, time
from pathlib import Path
from pipeline.data.prepare import prepare
from tests.support.data_helpers import BYTES

def wait(done, *_):
    if done:
        print("writing", flush=True)
        time.sleep(60)

prepare(Path(sys.argv[1]), Path(sys.argv[2]), BYTES, progress=wait)
"""


def test_a_killed_preparation_is_never_seen_and_the_next_one_cleans_up(
    corpus: Path, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(corpus), str(tmp_path / "out")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child:
        try:
            assert child.stdout.readline() == "writing\n"
        finally:
            child.send_signal(signal.SIGKILL)
    left = {path.name for path in tmp_path.iterdir()} - {"corpus", ".out.lock"}
    assert len(left) == 1 and left.pop().startswith(".out.writing-")
    prepare(corpus, tmp_path / "out", tokenizer)  # and the dead process's lock does not block
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "corpus", "out"]
    open_shards(tmp_path / "out", tokenizer, verify=True)


def test_of_several_at_once_one_writes_and_the_others_reuse(
    corpus: Path, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    wrote: list[int] = []
    start = threading.Barrier(3)

    def one() -> object:
        start.wait()
        told: list[int] = []
        manifest = prepare(corpus, tmp_path / "out", tokenizer, progress=lambda *now: told.append(1))
        wrote.append(bool(told))
        return manifest

    with ThreadPoolExecutor(3) as pool:
        manifests = [future.result() for future in [pool.submit(one) for _ in range(3)]]
    assert sorted(wrote) == [False, False, True]
    assert manifests[0] == manifests[1] == manifests[2]


def test_waits_for_the_lock(corpus: Path, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with (tmp_path / ".out.lock").open("w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = pool.submit(prepare, corpus, tmp_path / "out", tokenizer)
        time.sleep(0.3)
        assert not waiting.done() and not (tmp_path / "out").exists()
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert waiting.result(60).documents == 7


def test_output_through_a_link_lands_where_it_points(corpus: Path, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    prepare(corpus, tmp_path / "link", tokenizer)
    assert (tmp_path / "link").is_symlink()
    assert len(open_shards(tmp_path / "disk" / "real", tokenizer)) == len(open_shards(tmp_path / "link"))


def test_text_of_another_kind_is_never_replaced(corpus: Path, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for out in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex", corpus):
        with pytest.raises(DataError, match=f"{out.name}: exists and holds something else than prepared tokens"):
            prepare(corpus, out, tokenizer)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    assert len(list(corpus.rglob("*.*"))) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "nowhere"], "nowhere: no such file or folder"),
        (["--tokenizer", "nowhere"], "nowhere: no tokenizer there"),
        (["--output", "file/tokens"], "file/tokens: cannot be written (File exists); choose another folder."),
        (["--input", "blank"], "blank: every document in it is empty; give it text."),
        (["--text-field", "body"], "b.jsonl: line 1 has no field 'body' (it has text)"),
        (["--input", "cut.txt.xz"], "cut.txt.xz: the archive is truncated or corrupt"),
    ],
)
def test_user_errors_are_one_sentence_and_status_2(
    corpus: Path,
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text("\n")
    (tmp_path / "cut.txt.xz").write_bytes(lzma.compress(b"text")[:-5])
    assert run(corpus, Path("tokens"), model, *arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and words in told.err
    assert not (tmp_path / "tokens").exists() and not list(tmp_path.glob(".tokens.writing*"))


@pytest.mark.parametrize("workers", ["0", "-1", "two"])
def test_a_bad_number_of_workers(
    corpus: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(corpus, tmp_path / "out", model, "--workers", workers)
    assert caught.value.code == 2
    said = f"error: --workers: must be a whole number, 1 or more, got '{workers}'; see "
    assert capsys.readouterr().err.startswith(said)


def test_as_a_program(corpus: Path, tmp_path: Path, light: TextTokenizer) -> None:
    command = [sys.executable, "-m", "tools.prepare_data", "--input", str(corpus), "--output", str(tmp_path / "out")]
    arguments = [*command, "--tokenizer", str(light.path), "--workers", "2"]
    good = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert good.returncode == 0 and good.stderr.count("\n") == 1 and "'</s>' in" in good.stderr
    assert "7 documents (1 empty skipped), written\n" in good.stdout
    bad = subprocess.run([*command, "--tokenizer", "nope"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: nope: no tokenizer there;") and bad.stderr.count("\n") == 1
