"""Places of tokens told by their lengths, beside those that the library keeps of the same text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from pipeline.data.masks import within_spans
from pipeline.data.places import as_array, byte_lengths, tokens_within
from tests.support.chat_tokenizers import byte_level, pieces

_LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
TEXT = st.text(st.sampled_from("ab  \n1'|é😀字\u0301\u2028\x00Ġ") | st.characters(codec="utf-8"), max_size=12)
SPELLED = st.lists(TEXT | st.sampled_from(["<|im_start|>", "</s>", "<tool>", "the whale"]), max_size=6).map("".join)


def _split() -> Tokenizer:
    """Split as Llama-3's, with an added token that is text."""
    made = byte_level()
    by_words = pre_tokenizers.Split(Regex(_LLAMA_3), "isolated")
    bytes_of_it = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), by_words, bytes_of_it])
    made.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
        ]
    )
    made.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("é字")])
    return made


def _lacking() -> Tokenizer:
    """Without tokens for most bytes, which it drops."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_tokens(["a", "b"])
    return Tokenizer.from_str(made.to_str().replace('"vocab":{}', '"vocab":{"a":0,"b":1,"Ġ":2,"Ã":3}'))


def _record(tokenizer: Tokenizer) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


KNOWN = {"as SmolLM2": byte_level(), "as Llama-3": _split(), "lacking bytes": _lacking()}
LENGTHS = {name: byte_lengths(_record(made), made) for name, made in KNOWN.items()}


@pytest.mark.parametrize("name", KNOWN)
@given(text=SPELLED, data=st.data())
def test_spans_are_where_the_librarys_places_say(name: str, text: str, data: st.DataObject) -> None:
    lengths = LENGTHS[name]
    assert lengths is not None
    spans = []
    for _ in range(data.draw(st.integers(0, 3))):
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        spans.append((start, stop))
    tokens = as_array(KNOWN[name].encode_batch_fast([text], add_special_tokens=False)[0].ids)
    wanted = within_spans(KNOWN[name].encode(text, add_special_tokens=False), spans)
    assert tokens.tolist() == wanted.tokens.tolist()
    found = tokens_within(lengths, tokens, text, spans)
    if found is None:
        assert name == "lacking bytes"
        return
    scored = np.zeros(tokens.size, bool)
    for first, stop in found:
        scored[first:stop] = True
    assert scored.tolist() == wanted.scored.tolist()


def test_bytes_that_make_no_token_are_missed() -> None:
    lengths, made = LENGTHS["lacking bytes"], KNOWN["lacking bytes"]
    assert lengths is not None
    tokens = as_array(made.encode("a?b").ids)
    assert tokens.size == 2 and tokens_within(lengths, tokens, "a?b", [(2, 3)]) is None
    assert tokens_within(lengths, as_array(made.encode("ab").ids), "ab", [(1, 2)]) == [(1, 2)]


def _changed(**parts: Any) -> Tokenizer:
    made = byte_level()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def _with(*added: AddedToken) -> Tokenizer:
    made = byte_level()
    made.add_tokens(list(added))
    return made


_REMOVED = pre_tokenizers.Split(Regex("[0-9]"), "removed")
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    "tokenizer",
    [
        pieces(),
        Tokenizer(models.WordLevel({"a": 0}, "a")),
        _changed(normalizer=normalizers.NFC()),
        _changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        _changed(pre_tokenizer=pre_tokenizers.Sequence([_REMOVED, _BYTES])),
        _changed(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), _BYTES])),
        _changed(pre_tokenizer=pre_tokenizers.Sequence([_BYTES, _BYTES])),
        _changed(post_processor=processors.ByteLevel(trim_offsets=True)),
        _changed(post_processor=processors.RobertaProcessing(("</s>", 2), ("<s>", 1))),
        _changed(model=models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True)),
        _changed(model=models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>")),
        _with(AddedToken("<tool>", lstrip=True)),
        _with(AddedToken("<tool>", rstrip=True)),
        _with(AddedToken("Ġa")),
    ],
)
def test_what_does_not_follow_from_lengths_is_left_to_the_library(tokenizer: Tokenizer) -> None:
    assert byte_lengths(_record(tokenizer), tokenizer) is None
