"""Long documents tokenized in parts have exactly the tokens that the tokenizer's own library gives the whole."""

from __future__ import annotations

import io
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, trainers
from tokenizers import normalizers as N
from tokenizers import pre_tokenizers as P

from pipeline.data.prepare import tokenize
from pipeline.data.segments import Segment, segments
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer

ROOT = Path(__file__).parents[3]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{number:02X}>" for number in range(256)]
ATOMS = [
    *(
        "the whale",
        " the",
        "whale's",
        "Ishmael",
        " 1851",
        "12345",
        "a",
        "A",
        "_",
        ".",
        ", ",
        " .",
        "...",
        "?!",
        "'",
        "'S",
    ),
    *(" ", "  ", "    ", "\n", "\n\n", " \n ", "\r\n", "\t", "\u00a0", "\u2028", "\u3000", "\u200b"),
    *(
        "é",
        "e\u0301",
        "\u0301",
        "ﬁ",
        "½",
        "２",
        "ß",
        "ſ",
        "İ",
        "Привет",
        "我们",
        "。",
        "，",
        "が",
        "か\u3099",
        "\u1100\u1161",
        "각\u11a8",
    ),
    *("😀", "👩\u200d👧", "▁", "<tool>", "<soft>", "</s>", "<s>", "<0x0A>", "\0", "\U00020000", "字\ufe00", "一二"),
]


def corpus() -> list[str]:
    files = sorted((ROOT / "launch/demo").rglob("*.xz"))
    text = lzma.open(files[0], "rt").read()[20_000:120_000]
    return [*text.splitlines(keepends=True), *ATOMS * 5, "我们 的 书。我们\n" * 5]


CORPUS = corpus()


def trained(model: Any, trainer: Any, normalizer: Any, splitter: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    tokenizer.train_from_iterator(CORPUS[-800:], trainer)
    return tokenizer


def byte_level(*splitters: Any, normalizer: Any = None, **options: Any) -> Tokenizer:
    splitter = P.Sequence([*splitters, P.ByteLevel(add_prefix_space=False, **options)])
    alphabet = P.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer = trained(models.BPE(), trainer, normalizer, splitter)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def llama2(normalizer: Any, splitter: Any = None) -> Tokenizer:
    """A BPE with byte fallback over whole texts, its merges from words."""
    options = trainers.BpeTrainer(vocab_size=1200, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    base = json.loads(trained(models.BPE(unk_token="<unk>"), options, None, P.Metaspace()).to_str())
    made = json.loads(Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>")).to_str())
    made["model"] |= {name: base["model"][name] for name in ("vocab", "merges")}
    made["added_tokens"] = base["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(made))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    return tokenizer


def unigram(normalizer: Any, splitter: Any) -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return trained(models.Unigram(), trainer, normalizer, splitter)


def split(pattern: str) -> Any:
    return P.Split(Regex(pattern), "isolated")


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    strips = {"lstrip": True, "rstrip": True, "normalized": True}
    tokenizer.add_tokens([AddedToken("<tool>", **strips), AddedToken("<soft>", normalized=False, single_word=True)])
    tokenizer.add_tokens([AddedToken("  ", normalized=False)])
    return tokenizer


PREFIX = N.Sequence([N.Prepend("▁"), N.Replace(" ", "▁")])
SHAPES = {
    "llama-2": lambda: llama2(PREFIX),
    "llama-2, NFKC": lambda: llama2(N.Sequence([N.NFKC(), PREFIX])),
    "llama-2, Metaspace": lambda: llama2(None, P.Metaspace(prepend_scheme="first", split=False)),
    "llama-2, added tokens": lambda: with_added(llama2(PREFIX)),
    "single digits": lambda: llama2(
        None, P.Sequence([P.Digits(individual_digits=True), P.Metaspace(prepend_scheme="first", split=False)])
    ),
    "gpt-2": lambda: byte_level(),
    "llama-3": lambda: byte_level(split(LLAMA3), use_regex=False),
    "llama-3, added tokens": lambda: with_added(byte_level(split(LLAMA3), use_regex=False)),
    "qwen2": lambda: byte_level(split(QWEN2), normalizer=N.NFC(), use_regex=False),
    "smollm": lambda: byte_level(P.Digits(individual_digits=True)),
    "bytes, never split": lambda: byte_level(use_regex=False),
    "between the matches": lambda: byte_level(split(r"[A-Za-z]{2,}|\.{2,}"), use_regex=False),
    "unigram, NFKC": lambda: unigram(N.NFKC(), P.Metaspace()),
    "unigram, lower case": lambda: unigram(N.Sequence([N.NFKD(), N.StripAccents(), N.Lowercase()]), P.Metaspace()),
    "bert": lambda: trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False),
        N.BertNormalizer(),
        P.Sequence([P.WhitespaceSplit(), P.Punctuation()]),
    ),
}


def write_pieces(folder: Path, **options: Any) -> Path:
    written = io.BytesIO()
    settings: dict[str, Any] = {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line.replace("\0", "") for line in CORPUS]),
        model_writer=written,
        vocab_size=900,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**settings, **options},
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return folder


PIECES: dict[str, dict[str, Any]] = {
    "sentencepiece, identity": {"normalization_rule_name": "identity", "split_digits": True},
    "sentencepiece, defaults": {"remove_extra_whitespaces": True, "byte_fallback": False},
    "sentencepiece, symbols": {"user_defined_symbols": ["<tool>", "e▁w", "▁▁"], "add_dummy_prefix": False},
}


@pytest.fixture(scope="module", params=[*SHAPES, *PIECES])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTokenizer, Any]:
    """A tokenizer loaded, and its own library's way from text to ids, special tokens never made from text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param in PIECES:
        processor = sentencepiece.SentencePieceProcessor(
            model_file=str(write_pieces(folder, **PIECES[request.param]) / "tokenizer.model")
        )
        return load_tokenizer(folder), lambda text: processor.encode(text)
    whole = SHAPES[request.param]()
    whole.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    if request.param.startswith("unigram"):
        # The library finds special tokens in its vocabulary too; sentencepiece, whose model this is, does not.
        record = json.loads(whole.to_str())
        record["model"]["vocab"][:3] = [[text, -1e6] for text in SPECIAL]
        whole = Tokenizer.from_str(json.dumps(record))
    whole.encode_special_tokens = True
    return load_tokenizer(folder), lambda text: whole.encode(text, add_special_tokens=False).ids


def in_parts(tokenizer: TextTokenizer, text: str, size: int) -> tuple[list[int], list[Segment]]:
    """Tokens by way of parts of little more than `size` characters, the text itself arriving in pieces of three."""
    pieces = [(text[start : start + 3], start + 3 >= len(text)) for start in range(0, len(text), 3)]
    parts = list(segments(pieces, tokenizer.may_cut, size))
    assert "".join(part.text for part in parts) == text
    ids, lengths, unfinished = tokenize(parts, tokenizer)
    assert (lengths.tolist(), unfinished) == ([len(ids)], 0)
    return ids[:-1].tolist(), parts


def test_a_book_in_parts(pair: tuple[TextTokenizer, Any]) -> None:
    tokenizer, oracle = pair
    text = "".join(CORPUS[:300])
    ids, parts = in_parts(tokenizer, text, 40)
    assert ids == oracle(text)
    assert len(parts) > 2, "no place was found to cut"


@settings(max_examples=60, deadline=None)
@given(atoms=st.lists(st.sampled_from(ATOMS), min_size=1, max_size=24), size=st.integers(1, 12))
def test_whatever_text_in_parts(pair: tuple[TextTokenizer, Any], atoms: list[str], size: int) -> None:
    tokenizer, oracle = pair
    text = "".join(atoms)
    assert in_parts(tokenizer, text, size)[0] == oracle(text)


def test_every_cut_allowed_in_a_text_is_exact(pair: tuple[TextTokenizer, Any]) -> None:
    tokenizer, oracle = pair
    cut = 0
    for left in ATOMS:
        for right in ATOMS:
            if tokenizer.may_cut(left[-1], right[0]):
                cut += 1
                for before, after in (
                    ("", ""),
                    ("the whale  ", " saw  it"),
                    ("\n", "\n \u0301"),
                    ("<tool>", "<tool> "),
                ):
                    text = before + left + right + after
                    parts = [Segment("", before + left, False), Segment(left[-1], right + after, True)]
                    assert tokenize(parts, tokenizer)[0][:-1].tolist() == oracle(text), text
    assert cut
