"""Where tokens stand in their text, told by how many bytes each of them is.

The library keeps the place of every token if asked, and then takes a quarter more time. The tokens of a byte-level BPE
(Llama-3, Qwen, SmolLM2) are the bytes of their text, one after the other: their lengths say it as well.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from pipeline.data.cuts import parts_of

_ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())
"""The characters that stand for the 256 bytes in a byte-level vocabulary."""
_KEEPING = ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
"""What `Split` may do with what it finds, and keep it."""


def as_array(ids: list[int]) -> NDArray[np.uint32]:
    """Token ids as numpy's, several times as fast as numpy makes them of a list."""
    return np.frombuffer(array("I", ids), np.uint32)


def byte_lengths(record: dict[str, Any], encoder: Any) -> NDArray[np.int64] | None:
    """UTF-8 bytes of the text that each token stands for, by id; None: tokens alone do not say that.

    Args:
        record: content of a tokenizer.json that the library reads.
        encoder: the library's tokenizer of it, which may have more added tokens.
    """
    if record.get("normalizer") is not None or not _splits_into_bytes(record) or _trims(record):
        return None
    model = record["model"]
    unusual = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    vocabulary: dict[str, int] = encoder.get_vocab(with_added_tokens=False)
    if type(encoder.model).__name__ != "BPE" or any(model.get(name) for name in unusual):
        return None
    if model.get("unk_token") and not vocabulary.keys() >= _ALPHABET:
        return None  # several bytes may become one unknown token; without one they are dropped, and missed in the sum
    contents = {number: content for content, number in vocabulary.items()}
    added = encoder.get_added_tokens_decoder()
    lengths = np.zeros(1 + max(*contents, *added), np.int64)
    for number, content in contents.items():
        lengths[number] = len(content)  # a character a byte
    for number, token in added.items():
        content = token.content
        as_word = not content.isascii() and _ALPHABET.issuperset(content)  # it may be another text's
        if token.lstrip or token.rstrip or as_word or contents.get(number, content) != content:
            return None
        lengths[number] = len(content.encode())
    return lengths


def _splits_into_bytes(record: dict[str, Any]) -> bool:
    *before, last = [None, *parts_of(record.get("pre_tokenizer"), "pretokenizers")]
    return (
        last is not None
        and last["type"] == "ByteLevel"
        and not last["add_prefix_space"]
        and all(
            part is None or part["type"] == "Digits" or (part["type"] == "Split" and part["behavior"] in _KEEPING)
            for part in before
        )
    )


def _trims(record: dict[str, Any]) -> bool:
    """Whether the library takes the blanks at the ends of a token for no part of it, or this is not known."""
    parts = parts_of(record.get("post_processor"), "processors")
    return any(
        part["type"] != "TemplateProcessing" and (part["type"] != "ByteLevel" or part["trim_offsets"]) for part in parts
    )


def tokens_within(
    lengths: NDArray[np.int64], tokens: NDArray[np.uint32], text: str, spans: Sequence[tuple[int, int]]
) -> list[tuple[int, int]] | None:
    """From which token up to which the spans of a text reach, through the first token of their last character.

    Args:
        lengths: see `byte_lengths`.
        tokens: of the whole text, [T].
        spans: from where to where, in characters; empty ones are left out.

    Returns:
        Slices of the tokens; None: the tokens are not the bytes of the text.
    """
    # The first character of each span, and its last.
    places = [place for start, stop in spans if start < stop for place in (start, stop - 1)]
    size = len(text)
    if not text.isascii():
        in_bytes, before, size = {}, 0, 0
        for place in sorted({*places, len(text)}):
            size += len(text[before:place].encode())
            in_bytes[place], before = size, place
        places = [in_bytes[place] for place in places]
    ends = lengths[tokens].cumsum()
    if (int(ends[-1]) if ends.size else 0) != size:
        return None
    found = ends.searchsorted(places, "right").tolist()
    return [(first, last + 1) for first, last in zip(found[::2], found[1::2], strict=True)]
