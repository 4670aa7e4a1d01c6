"""The identity of a tokenizer: which ids a text becomes, and nothing else.

Made of what decides that (normalization, splitting, vocabulary, merges, tokens matched in text, the id that ends a
document) and of the ids that probe texts in fact become, so that a library that tokenizes otherwise is noticed. Chat
templates, lengths, special tokens, names of classes and the spelling of the files have no part in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

_FORMAT = "longspan tokens 2"
"""1 was a hash of all of the folder's files, see `readings.same_tokens`."""

PROBES = (
    "The whale, which Ishmael hadn't seen since 1851, isn't THERE; they'll say it's 3.14159 or 12,345,678.",
    "    return f(x)[0] == {'a': 1}  # four spaces\n\n\tif not y:\n\t\tpass\r\n",
    "Größe, naïve café, œuvre, İstanbul, ἀρχή, Привет мир, שלום עולם, مرحبا بالعالم, नमस्ते दुनिया",
    "你好，世界。日本語のテキスト「かな」とカナ。 한국어 문장입니다. สวัสดีชาวโลก",
    "ﬁne ½ ２０２４ Ａ e\u0301 \u212b ™ … “quoted” – a\u00a0b\u2009c\u200bd\ufeffe",
    "😀👩\u200d👩\u200d👧 🇩🇪 \U00020000 ▁ \u2028 x  y   z     \n \n\n trailing  ",
    "http://example.org/a_b-c?d=e&f=%20 <b>bold</b> \\alpha_{i} ∑ ≤ → ======== ........ ##",
    "x",
    "",
)
"""Short texts in which tokenizers differ."""

_MODEL_DEFAULTS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
_MODEL_SWITCHES = ("fuse_unk", "byte_fallback", "ignore_merges")
_ALIKE = ("trim_offsets",)
"""Fields that change where a token lies in the text, not which it is."""

Encode = Callable[[str], list[int]]


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        # Length first, so that bytes cannot move between parts unnoticed.
        digest.update(f"{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _probed(encode: Encode) -> str:
    return _canonical([encode(text) for text in PROBES])


def _deciding(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _deciding(value) for key, value in part.items() if key not in _ALIKE}
    return [_deciding(member) for member in part] if isinstance(part, list) else part


def fast_identity(record: dict[str, Any], eos: int, encode: Encode) -> str:
    """sha256 (hex) of the mapping from text to ids of a tokenizer.json.

    Args:
        record: its content.
        eos: id that ends a document.
        encode: gives the ids of a text.
    """
    model = {
        key: value
        for key, value in record["model"].items()
        # Files of older releases lack what newer ones write as its default.
        if not (key in _MODEL_DEFAULTS and value in (None, "") or key in _MODEL_SWITCHES and not value)
    }
    if "merges" in model:
        model["merges"] = [list(pair) if not isinstance(pair, str) else pair.split(" ", 1) for pair in model["merges"]]
    matched = [token for token in record.get("added_tokens") or [] if not token["special"]]
    parts = [_deciding(record.get(name)) for name in ("normalizer", "pre_tokenizer")]
    return _digest([_FORMAT, *map(_canonical, (*parts, model, matched, eos)), _probed(encode)])


def piece_identity(model: Any, eos: int, encode: Encode) -> str:
    """sha256 (hex) of the mapping from text to ids of a sentencepiece model.

    Args:
        model: its ModelProto.
        eos: id that ends a document.
        encode: gives the ids of a text.
    """
    trained, normal = model.trainer_spec, model.normalizer_spec
    settings = [trained.model_type, trained.byte_fallback, trained.treat_whitespace_as_suffix]
    settings += [normal.add_dummy_prefix, normal.remove_extra_whitespaces, normal.escape_whitespaces]
    pieces = [[piece.piece, piece.score, piece.type] for piece in model.pieces]
    charsmap = normal.precompiled_charsmap
    return _digest([_FORMAT, *map(_canonical, (settings, pieces, eos)), charsmap, _probed(encode)])
