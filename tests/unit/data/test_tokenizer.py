"""Tokenizers from a Hugging Face folder and from sentencepiece: text is data; what does not load, one sentence."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from parallel.errors import DataError
from pipeline.data.tokenizer import HfTokenizer, SentencePieceTokenizer, TextTokenizer, load_tokenizer

CORPUS = [f"the {animal} saw {number} other animals" for animal in ("whale", "cow", "gull") for number in range(40)]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]
NASTY = ["</s>", "a</s>b", "<s>x</s>", "<|im_end|>", " </s> ", "<unk>", "<0x0A>"]


def write_hf(folder: Path, **settings: Any) -> Path:
    """A byte-level BPE whose template adds <s> and </s>, as Llama's does; `settings` replace those of the config."""
    whole = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    whole.train_from_iterator(CORPUS, trainer)
    whole.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    folder.mkdir()
    whole.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<|im_end|>"],
        "model_max_length": 8,
        **settings,
    }
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return folder


def write_sentencepiece(file: Path, **options: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    file.write_bytes(model.getvalue())
    return file


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def sp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("sp") / "tokenizer.model")


@pytest.fixture(params=["hf", "sp"])
def loaded(request: pytest.FixtureRequest) -> TextTokenizer:
    return load_tokenizer(request.getfixturevalue(request.param))


def text_of(tokenizer: TextTokenizer, ids: list[int]) -> str:
    inner: Any = tokenizer
    if isinstance(tokenizer, SentencePieceTokenizer):
        return inner._processor.decode(ids)
    return inner._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_ids_of_the_special_tokens_and_size(hf: Path, sp: Path) -> None:
    from_hf, from_sp = load_tokenizer(hf), load_tokenizer(sp)
    assert (from_hf.bos_id, from_hf.eos_id, from_hf.vocab_size) == (1, 2, 320)
    assert (from_sp.bos_id, from_sp.eos_id) == (1, 2)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sp))
    assert from_sp.vocab_size == processor.vocab_size() > 259
    assert (from_hf.path, from_sp.path) == (hf, sp)


@pytest.mark.parametrize("text", ["the whale", "Zoë 😀\r\n\n\ttab  ", "x" * 50, *NASTY])
def test_text_comes_back_whole_and_without_special_tokens(loaded: TextTokenizer, text: str) -> None:
    ids = loaded.encode(text)
    assert text_of(loaded, ids) == text
    assert not {loaded.bos_id, loaded.eos_id, 0, *([3] if isinstance(loaded, HfTokenizer) else [])} & set(ids)
    assert all(type(token) is int and 0 <= token < loaded.vocab_size for token in ids)


def test_frequent_words_are_single_tokens(loaded: TextTokenizer) -> None:
    assert len(loaded.encode("the whale saw")) < 9  # neither characters nor bytes


def test_empty_text_has_no_tokens_and_long_text_is_not_cut(hf: Path, loaded: TextTokenizer) -> None:
    assert loaded.encode("") == []
    assert text_of(loaded, loaded.encode(CORPUS[0] * 30)) == CORPUS[0] * 30
    assert json.loads((hf / "tokenizer_config.json").read_text())["model_max_length"] == 8


def test_truncation_stored_in_the_file_is_ignored(hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "cut")
    file = tmp_path / "cut" / "tokenizer.json"
    record = json.loads(file.read_text())
    record["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    record["padding"] = {
        **dict.fromkeys(("pad_id", "pad_type_id"), 0),
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_token": "<unk>",
    }
    file.write_text(json.dumps(record))
    assert load_tokenizer(tmp_path / "cut").encode(CORPUS[0]) == load_tokenizer(hf).encode(CORPUS[0])


def test_added_tokens_count_in_the_size(hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "more")
    file = tmp_path / "more" / "tokenizer.json"
    record = json.loads(file.read_text())
    record["added_tokens"].append({**record["added_tokens"][-1], "id": 320, "content": "<pad>"})
    file.write_text(json.dumps(record))
    assert load_tokenizer(tmp_path / "more").vocab_size == 321


def test_every_way_to_name_one(hf: Path, sp: Path, tmp_path: Path) -> None:
    assert load_tokenizer(hf / "tokenizer.json").path == hf
    assert isinstance(load_tokenizer(sp.parent), SentencePieceTokenizer)
    shutil.copytree(hf, tmp_path / "both")
    shutil.copy(sp, tmp_path / "both")
    assert isinstance(load_tokenizer(tmp_path / "both"), HfTokenizer)


def test_fingerprint_is_of_content_not_of_place(hf: Path, sp: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy").fingerprint
    assert copy == load_tokenizer(hf).fingerprint
    (tmp_path / "copy" / "README.md").write_text("not of the tokenizer")
    assert load_tokenizer(tmp_path / "copy").fingerprint == copy
    changed = write_hf(tmp_path / "changed", model_max_length=9)
    moved = write_sentencepiece(tmp_path / "tokenizer.model", split_digits=True)
    prints = [load_tokenizer(path).fingerprint for path in (hf, sp, changed, moved)]
    assert len(set(prints)) == 4 and all(len(text) == 64 for text in prints)


def test_no_end_of_text_token(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", eos_token=None)
    with pytest.raises(DataError, match="hf: its tokenizer names no end-of-text token; set eos_token in"):
        load_tokenizer(folder)
    file = write_sentencepiece(tmp_path / "x.model", eos_id=-1, bos_id=-1)
    with pytest.raises(DataError, match="x.model: has no end-of-text piece; train .* eos_id >= 0"):
        load_tokenizer(file)


def test_no_start_token_is_none(tmp_path: Path) -> None:
    assert load_tokenizer(write_hf(tmp_path / "hf", bos_token=None)).bos_id is None
    assert load_tokenizer(write_sentencepiece(tmp_path / "x.model", bos_id=-1, eos_id=1)).bos_id is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "1.0"}', '{"version": "1.0", "model": {"type": "Evil"}}'])
def test_damaged_tokenizer_json(hf: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(hf, tmp_path / "bad")
    (tmp_path / "bad" / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"bad: its tokenizer does not load \(.+\); copy the model's again") as caught:
        load_tokenizer(tmp_path / "bad")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 1, 1000])
def test_damaged_sentencepiece(sp: Path, tmp_path: Path, cut: int) -> None:
    file = tmp_path / "cut.model"
    file.write_bytes(sp.read_bytes()[:cut])
    with pytest.raises(DataError, match="cut.model: is not a readable sentencepiece model; copy it again"):
        load_tokenizer(file)


def test_code_of_the_folder_is_not_run(hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "evil")
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    settings = json.loads((hf / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "evil" / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        load_tokenizer(tmp_path / "evil")
    except DataError as error:
        assert "evil: its tokenizer does not load" in str(error)
    assert not (tmp_path / "ran").exists()


def test_wrong_places(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    cases = {
        "nowhere": "nowhere: no tokenizer there; give the model's folder",
        "a.txt": "a.txt: is not a tokenizer; give a folder with tokenizer.json or a sentencepiece .model file",
        "empty": "empty: holds no tokenizer; copy the model's tokenizer.json",
    }
    for name, words in cases.items():
        with pytest.raises(DataError, match=words):
            load_tokenizer(tmp_path / name)
