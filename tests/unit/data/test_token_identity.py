"""A tokenizer is known by what it makes of text: the special tokens its files name, its fingerprint, other readings."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, models
from tokenizers import normalizers as N
from tokenizers import pre_tokenizers as P

from parallel.errors import DataError
from pipeline.data import token_identity
from pipeline.data.prepare import cache_folder, open_text_or_shards
from pipeline.data.readings import differing_readings
from pipeline.data.shard_writer import ShardWriter
from pipeline.data.shards import MANIFEST, open_shards
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from tests.unit.data.test_tokenizer import write_hf, write_sentencepiece

CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
DICTIONARY = {"content": "<|im_end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def sp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("sp") / "tokenizer.model").parent


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({CONFIG: {"eos_token": "<|im_end|>"}}, 3),
        ({CONFIG: {"eos_token": DICTIONARY}}, 3),
        ({CONFIG: {}, SPECIAL: {"eos_token": "<|im_end|>"}}, 3),
        ({SPECIAL: {"eos_token": DICTIONARY}}, 3),
        ({CONFIG: {"eos_token": "<s>"}, SPECIAL: {"eos_token": "<|im_end|>"}}, 1),
        ({CONFIG: {"eos_token": None}, "config.json": {"eos_token_id": 3}}, 3),
        ({"config.json": {"eos_token_id": [3, 2]}}, 3),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [3, 2]}}, 3),
        ({CONFIG: {"eos_token": "<end>", "added_tokens_decoder": {"320": {"content": "<end>"}}}}, 320),
        ({CONFIG: {"eos_token": "<end>"}, ADDED: {"<end>": 321}}, 321),
    ],
)
@pytest.mark.parametrize("kind", ["hf", "sp"])
def test_the_end_of_text_as_the_files_say(
    hf: Path, sp: Path, tmp_path: Path, kind: str, files: dict[str, Any], eos: int
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(hf if kind == "hf" else sp, folder)
    (folder / CONFIG).unlink(missing_ok=True)
    if kind == "sp":
        files = {ADDED: {"<|im_end|>": 3}, **files} if eos == 3 else files
        if not any("eos_token" in content for name, content in files.items() if name in (CONFIG, SPECIAL)):
            eos = 2  # the model itself knows
        if files.get(CONFIG, {}).get("eos_token", "") is None:
            eos = 2
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    loaded = load_tokenizer(folder)
    assert loaded.eos_id == eos
    assert loaded.vocab_size > eos
    assert loaded.eos_id not in loaded.encode("the</s><|im_end|><s>")


def test_a_unigram_never_makes_special_tokens_of_text(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in "<>/sab")]
    whole = Tokenizer(models.Unigram(pieces, 0, False))
    whole.add_special_tokens(["<unk>", "<s>", "</s>"])
    whole.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / CONFIG).write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (1, 2, 9)
    assert loaded.encode("a</s>b") == [7, 3, 5, 6, 4, 8]
    assert loaded.encode("ab") == whole.encode("ab").ids


def edited(source: Path, folder: Path, name: str, change: Any) -> TextTokenizer:
    shutil.copytree(source, folder)
    record = json.loads((folder / name).read_text())
    change(record)
    (folder / name).write_text(json.dumps(record))
    return load_tokenizer(folder)


TOKEN = {"id": 320, "content": "<pad>", **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}
NOTHING_TO_TEXT: list[tuple[str, Any]] = [
    (CONFIG, lambda r: r.update(chat_template="{{ x }}")),
    (CONFIG, lambda r: r.update(model_max_length=9)),
    (CONFIG, lambda r: r.update(tokenizer_class="LlamaTokenizer", legacy=False)),
    ("tokenizer.json", lambda r: r.update(post_processor=None)),
    ("tokenizer.json", lambda r: r["added_tokens"].append({**TOKEN, "special": True})),
    ("tokenizer.json", lambda r: r["model"].pop("ignore_merges")),
    ("tokenizer.json", lambda r: r["model"].update(merges=[" ".join(pair) for pair in r["model"]["merges"]])),
    ("tokenizer.json", lambda r: r["pre_tokenizer"].update(trim_offsets=False)),
]
OTHER_TOKENS: list[tuple[str, Any]] = [
    (CONFIG, lambda r: r.update(eos_token="<|im_end|>")),
    ("tokenizer.json", lambda r: r["pre_tokenizer"].update(add_prefix_space=True)),
    ("tokenizer.json", lambda r: r["pre_tokenizer"].update(use_regex=False)),
    ("tokenizer.json", lambda r: r.update(normalizer={"type": "NFC"})),
    ("tokenizer.json", lambda r: r["added_tokens"].append({**TOKEN, "special": False})),
    ("tokenizer.json", lambda r: r["model"]["merges"].pop()),
    ("tokenizer.json", lambda r: r["model"]["merges"].reverse()),
]


def test_fingerprint_is_of_the_tokens_alone(hf: Path, sp: Path, tmp_path: Path) -> None:
    own = load_tokenizer(hf).fingerprint
    for number, (name, change) in enumerate(NOTHING_TO_TEXT):
        assert edited(hf, tmp_path / f"same{number}", name, change).fingerprint == own, number
    others = [edited(hf, tmp_path / f"other{n}", *edit).fingerprint for n, edit in enumerate(OTHER_TOKENS)]
    digits = load_tokenizer(write_sentencepiece(tmp_path / "digits.model", split_digits=True)).fingerprint
    pieces = load_tokenizer(sp).fingerprint
    assert len({own, *others, digits, pieces}) == len(OTHER_TOKENS) + 3
    (tmp_path / "copy.model").write_bytes((sp / "tokenizer.model").read_bytes())
    assert load_tokenizer(tmp_path / "copy.model").fingerprint == pieces


def test_a_library_that_tokenizes_otherwise_is_noticed(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = load_tokenizer(hf).fingerprint
    encode = type(load_tokenizer(hf)).encode
    monkeypatch.setattr(
        type(load_tokenizer(hf)), "encode", lambda self, text: encode(self, text.replace("\u212b", "A"))
    )
    assert load_tokenizer(hf).fingerprint != own
    assert all(text in "".join(token_identity.PROBES) for text in ("1851", "\n\n", "é", "\u200d", "你好", "ﬁ"))


def first_format(folder: Path, names: list[str]) -> str:
    """The fingerprint as earlier releases made it."""
    digest = hashlib.sha256()
    for name in names:
        data = (folder / name).read_bytes()
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def prepared(out: Path, tokenizer: TextTokenizer, fingerprint: str, eos: int | None = None) -> Path:
    with ShardWriter(out, tokenizer) as writer:
        writer.add(np.array([5, 6, tokenizer.eos_id], np.uint32), np.array([3]))
        writer.finish((), 0, "text")
    record = json.loads((out / MANIFEST).read_text())
    record |= {"tokenizer": fingerprint, "eos_id": tokenizer.eos_id if eos is None else eos}
    (out / MANIFEST).write_text(json.dumps(record))
    return out


def test_tokens_prepared_by_an_earlier_release(hf: Path, sp: Path, tmp_path: Path) -> None:
    fast, slow = load_tokenizer(hf), load_tokenizer(sp)
    old = {"hf": first_format(hf, ["tokenizer.json", CONFIG]), "sp": first_format(sp, ["tokenizer.model"])}
    assert len(open_shards(prepared(tmp_path / "a", fast, old["hf"]), fast)) == 3
    assert len(open_shards(prepared(tmp_path / "b", slow, old["sp"]), slow)) == 3
    for number, (tokenizer, name, eos) in enumerate([(fast, "sp", 2), (slow, "hf", 2), (slow, "sp", 1)]):
        with pytest.raises(DataError, match="made with another tokenizer than"):
            open_shards(prepared(tmp_path / f"c{number}", tokenizer, old[name], eos), tokenizer)


def test_text_cached_by_an_earlier_release_is_not_tokenized_again(sp: Path, tmp_path: Path) -> None:
    slow = load_tokenizer(sp)
    (tmp_path / "a.txt").write_text("the whale saw")
    old = first_format(sp, ["tokenizer.model"])
    new = open_text_or_shards(tmp_path / "a.txt", tmp_path / "cache", slow).folder
    named = cache_folder(tmp_path / "a.txt", tmp_path / "cache", slow, "text", old)
    new.rename(named)
    record = json.loads((named / MANIFEST).read_text())
    (named / MANIFEST).write_text(json.dumps({**record, "tokenizer": old}))
    assert open_text_or_shards(tmp_path / "a.txt", tmp_path / "cache", slow).folder == named
    (tmp_path / "a.txt").write_text("the whale saw more")
    assert open_text_or_shards(tmp_path / "a.txt", tmp_path / "cache", slow).folder == new


def rebuilt(folder: Path) -> Path:
    """A Llama-2 shape without a space in front, which transformers' LlamaTokenizer puts there."""
    letters = [chr(number) for number in range(33, 127)] + ["▁"]
    numbers = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *letters, "th", "▁th"])}
    whole = Tokenizer(models.BPE(numbers, [("t", "h"), ("▁", "th")], unk_token="<unk>", fuse_unk=True))
    whole.normalizer = N.Replace(" ", "▁")
    whole.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir()
    whole.save(str(folder / "tokenizer.json"))
    (folder / CONFIG).write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "legacy": False})
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_another_reading_is_told_and_what_it_prepared_is_refused(hf: Path, sp: Path, tmp_path: Path) -> None:
    assert differing_readings(load_tokenizer(hf)) == differing_readings(load_tokenizer(sp)) == ()
    folder = rebuilt(tmp_path / "llama")
    loaded = load_tokenizer(folder)
    assert loaded.encode("the the") == Tokenizer.from_file(str(folder / "tokenizer.json")).encode("the the").ids
    (told,) = differing_readings(loaded)
    assert told.startswith(f"{folder}: transformers makes ") and "tokenizer.json is followed" in told
    old = first_format(folder, ["tokenizer.json", CONFIG])
    with pytest.raises(DataError, match="made with another tokenizer than"):
        open_shards(prepared(tmp_path / "old", loaded, old), loaded)
    shutil.copytree(hf, tmp_path / "both")
    shutil.copy(sp / "tokenizer.model", tmp_path / "both")
    both = load_tokenizer(tmp_path / "both")
    assert any(line.startswith(f"{tmp_path / 'both'}: tokenizer.model makes ") for line in differing_readings(both))
    assert both.encode("the whale") == load_tokenizer(hf).encode("the whale")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sp / "tokenizer.model"))
    assert both.encode("the whale") != processor.encode("the whale")


def test_stored_metaspace_is_kept(tmp_path: Path) -> None:
    folder = rebuilt(tmp_path / "llama")
    whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
    whole.normalizer = N.NFKC()
    whole.pre_tokenizer = P.Metaspace(prepend_scheme="first", split=False)
    whole.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("the ﬁ 2") == whole.encode("the ﬁ 2").ids
