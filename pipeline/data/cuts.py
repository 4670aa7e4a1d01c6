"""Where a text may be cut so that its parts, tokenized one by one, give exactly the tokens of the whole.

A cut is judged by the two characters it comes between, whatever else the text holds. For tokenizer.json it is exact if

- no added token holds both characters or touches the cut, so that finding added tokens is the same on both sides;
- normalization changes both sides apart from each other (`_plain`);
- each pre-tokenizer, up to the first that always splits there, treats the sides apart (`split_regex`); and
- one does always split there; or, if none does, the model is a BPE in which no merge joins a symbol that ends with the
  one character to a symbol that begins with the other: then no merge ever crosses the cut.

A Unigram model that is given whole documents adds up scores from their beginning, and which of two equal splits wins
depends on the rounding of that sum: no cut is exact there. sentencepiece's own BPE makes pieces of its vocabulary only,
so none may hold both characters. What is not understood is never cut.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer

from pipeline.data.split_regex import SplitPattern, UnknownPattern

_BLANKS = (" ", "\n")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` splits by if its `use_regex` says so."""
_WORDS = r"\w+|[^\w\s]+"
"""What `Whitespace` splits by."""
_JAMO = (("\u1100", "\u11ff"), ("\ua960", "\ua97f"), ("\ud7b0", "\ud7ff"))
"""Letters that join the letter before them when normalized."""
_SPACE = "\u2581"

Rule = Callable[[str, str], bool]
"""Called with the characters before and after a place: whether a cut there is exact."""


def never(left: str, right: str) -> bool:
    """The rule of a tokenizer of which nothing is known."""
    return False


def _plain(character: str) -> bool:
    """A visible character that every Unicode normalization leaves as it is and joins to nothing before it."""
    return (
        character <= "\uffff"
        and unicodedata.category(character)[0] not in "MCZ"
        and unicodedata.normalize("NFKD", character) == character
        and not any(first <= character <= last for first, last in _JAMO)
    )


def _after(character: str) -> bool:
    """A character that, more than `_plain`, joins to nothing after it: marks compose with letters, not with these."""
    return character in _BLANKS or "\u4e00" <= character <= "\u9fff"


def _holds_both(texts: Iterable[str]) -> set[tuple[str, str]]:
    return {pair for text in texts for pair in zip(text, text[1:], strict=False)}


def _engine(**parts: Any) -> Tokenizer:
    """A tokenizer of nothing but these parts of a tokenizer.json."""
    model = {"type": "BPE", "vocab": {}, "merges": []}
    return Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model, **parts}))


class _Apart(Exception):
    """The two sides are not treated apart, or nobody here knows that they are."""


class FastRule:
    """The `Rule` of a tokenizer.json.

    Args:
        record: its content, `normalizer`, `pre_tokenizer`, `added_tokens` and `model` among it.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        self._normalizers = list(parts_of(record.get("normalizer"), "normalizers"))
        self._splitters = list(parts_of(record.get("pre_tokenizer"), "pretokenizers"))
        self._model = record["model"]
        self._joined: set[tuple[str, str]] | None = None
        self._engines: dict[int, Any] = {}
        self._patterns: dict[int, SplitPattern] = {}
        normalizer = _engine(normalizer=record["normalizer"]).normalizer if record.get("normalizer") else None
        self._added: set[tuple[str, str]] = set()
        self._begins: set[str] = set()
        self._ends: set[str] = set()
        for token in record.get("added_tokens") or []:
            texts = [token["content"]]
            texts += [normalizer.normalize_str(texts[0])] if normalizer and token["normalized"] else []
            self._added |= _holds_both(texts)
            if not token["special"]:  # those are text; but they are looked for, and hide others
                self._begins |= {text[0] for text in texts if text}
                self._ends |= {text[-1] for text in texts if text}

    def __call__(self, left: str, right: str) -> bool:
        """Whether a cut between the two characters is exact, whatever stands before and after them."""
        # Added tokens take the white space beside them along, but none goes past a character that is visible.
        if not (_plain(left) and _after(right)):
            return False
        try:
            if self._touches_added(left, right):
                return False
            left, right = self._normalized(left, right)
            if self._touches_added(left, right):
                return False
            return self._splits(left, right)
        except (_Apart, UnknownPattern):
            return False

    def _touches_added(self, left: str, right: str) -> bool:
        return left in self._ends or right in self._begins or (left, right) in self._added

    def _normalized(self, left: str, right: str) -> tuple[str, str]:
        for number, part in enumerate(self._normalizers):
            kind = part["type"]
            if left.isspace():
                raise _Apart  # to be stripped, or looked ahead from
            if kind in ("Strip", "Prepend"):
                continue  # they work at the ends of a text
            if kind in ("NFC", "NFD", "NFKC", "NFKD", "StripAccents"):
                if not (_plain(left) and (_after(right) or right == _SPACE)):
                    raise _Apart
                continue
            if kind == "Replace":
                pattern = self._pattern(number, part["pattern"])
                one = len(part["pattern"].get("String", "")) == 1
                if not one and (pattern.touches(left) or pattern.touches(right)):
                    raise _Apart
            elif kind == "Precompiled":
                # Works on grapheme clusters: no cluster holds a letter of ASCII and a blank.
                if not (left.isascii() and right in _BLANKS):
                    raise _Apart
            elif kind not in ("Lowercase", "BertNormalizer", "Nmt", "ByteLevel"):
                raise _Apart
            if number not in self._engines:
                self._engines[number] = _engine(normalizer=part).normalizer
            before, after = (self._engines[number].normalize_str(text) for text in (left, right))
            if not before or not after:
                raise _Apart
            left, right = before[-1], after[0]
        if left.isspace():
            raise _Apart
        return left, right

    def _pattern(self, number: int, spec: dict[str, str] | str) -> SplitPattern:
        if number not in self._patterns:
            if isinstance(spec, str):
                self._patterns[number] = SplitPattern(spec)
            else:
                literal = "String" in spec
                self._patterns[number] = SplitPattern(spec["String" if literal else "Regex"], literal)
        return self._patterns[number]

    def _splits(self, left: str, right: str) -> bool:
        for number, part in enumerate(self._splitters, len(self._normalizers)):
            kind = part["type"]
            if kind == "Split" or kind == "Whitespace" or (kind == "ByteLevel" and part.get("use_regex", True)):
                spec = part["pattern"] if kind == "Split" else _WORDS if kind == "Whitespace" else _GPT2
                if self._splits_by(self._pattern(number, spec), part.get("behavior", "Isolated"), left, right):
                    return True
            if kind == "ByteLevel":
                if number not in self._engines:
                    self._engines[number] = _engine(normalizer={"type": "ByteLevel"}).normalizer
                left = self._engines[number].normalize_str(left)[-1]
                right = self._engines[number].normalize_str(right)[0]
            elif kind == "Metaspace":
                space = part["replacement"]
                if left == space:
                    raise _Apart
                right = space if right == " " else right
                if right == space and part.get("split", True):
                    return True
            elif kind == "Digits":
                digits = [unicodedata.category(character)[0] == "N" for character in (left, right)]
                if any(digits) and (part["individual_digits"] or not all(digits)):
                    return True
            elif kind in ("WhitespaceSplit", "BertPreTokenizer"):
                if right.isspace():
                    return True
                if kind == "BertPreTokenizer":
                    raise _Apart
            elif kind == "CharDelimiterSplit":
                if part["delimiter"] in (left, right):
                    return True
            elif kind not in ("Split", "Whitespace"):
                raise _Apart
        return self._no_merge_crosses(left, right)

    @staticmethod
    def _splits_by(pattern: SplitPattern, behavior: str, left: str, right: str) -> bool:
        before, after = pattern.touches(left), pattern.touches(right)
        if not before and not after:
            return False
        if behavior not in ("Isolated", "Removed") or pattern.joins(left, right):
            raise _Apart
        return (before and pattern.always_takes(left, False)) or (after and pattern.always_takes(right, True))

    def _no_merge_crosses(self, left: str, right: str) -> bool:
        model = self._model
        unusual = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        if model["type"] != "BPE" or any(model.get(name) for name in unusual):
            return False
        # Unknown characters may fuse with each other.
        if left not in model["vocab"] and right not in model["vocab"]:
            return False
        if self._joined is None:
            merges = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
            self._joined = {(one[-1], two[0]) for one, two in merges}
        return (left, right) not in self._joined


def parts_of(part: dict[str, Any] | None, members: str) -> Iterable[dict[str, Any]]:
    """A part of a tokenizer.json, or those that it is a sequence of.

    Args:
        members: key of those.
    """
    if part is not None and part["type"] == "Sequence":
        for member in part[members]:
            yield from parts_of(member, members)
    elif part is not None:
        yield part


_BPE = 2
_MADE_OF_TEXT = (1, 4, 5)
"""sentencepiece's kinds of pieces: normal, defined by the user, unused."""
_COMMON = ("identity", "nfkc", "nmt_nfkc")


class PieceRule:
    """The `Rule` of a sentencepiece model.

    Args:
        model: its ModelProto.
    """

    def __init__(self, model: Any) -> None:
        self._maps = bool(model.normalizer_spec.precompiled_charsmap)
        self._space = _SPACE if model.normalizer_spec.escape_whitespaces else " "
        self._known = (
            model.trainer_spec.model_type == _BPE
            and not model.trainer_spec.treat_whitespace_as_suffix
            and (not self._maps or model.normalizer_spec.name in _COMMON)
        )
        pieces = [piece.piece for piece in model.pieces if piece.type in _MADE_OF_TEXT]
        self._single = {piece for piece in pieces if len(piece) == 1}
        self._joined = _holds_both(pieces)

    def __call__(self, left: str, right: str) -> bool:
        """Whether a cut between the two characters is exact, whatever stands before and after them."""
        if not self._known or not _plain(left) or not _after(right) or left == self._space:
            return False
        if self._maps and not (left.isascii() and right == " "):
            return False
        right = self._space if right == " " else right
        # Unknown characters fuse with each other.
        return bool({left, right} & self._single) and (left, right) not in self._joined
