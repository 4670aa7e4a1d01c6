"""Other readings of a tokenizer's folder beside the one in use: transformers', sentencepiece's, a past release's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from parallel.errors import DataError
from pipeline.data.token_identity import PROBES
from pipeline.data.tokenizer import HfTokenizer, SentencePieceTokenizer, TextTokenizer

_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""What fingerprints of the first format hashed of a folder, in this order."""


def differing_readings(tokenizer: TextTokenizer) -> tuple[str, ...]:
    """One sentence for every other reading of the tokenizer's folder that makes other tokens of a probe text.

    Imports transformers, which takes seconds.
    """
    if isinstance(tokenizer, HfTokenizer):
        if not (tokenizer.path / "tokenizer.json").is_file():
            return ()
        pieces = tokenizer.path / "tokenizer.model"
        readings = {"transformers": _transformers(tokenizer.path), "tokenizer.model": _pieces(pieces)}
        folder, used = tokenizer.path, "tokenizer.json"
    elif isinstance(tokenizer, SentencePieceTokenizer) and (tokenizer.path.parent / "tokenizer_config.json").is_file():
        folder, used = tokenizer.path.parent, tokenizer.path.name
        readings = {"transformers": _transformers(folder)}
    else:
        return ()
    sentences = []
    for name, other in readings.items():
        for text, ids in zip(PROBES, other or (), strict=False):
            own = tokenizer.encode(text)
            if own != ids:
                sentences.append(
                    f"{folder}: {name} makes {len(ids)} tokens of {text[:24]!r}... and {used} {len(own)}, which may be "
                    f"other ones; {used} is followed, so check that the model was trained with it."
                )
                break
    return tuple(sentences)


def _transformers(folder: Path) -> list[list[int]] | None:
    """What transformers makes of the probe texts; None: it does not read this folder."""
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        # The text's own "</s>" is text, as everywhere here.
        settings = {"add_special_tokens": False, "split_special_tokens": True, "truncation": False, "verbose": False}
        return [list(loaded(text, **settings)["input_ids"]) for text in PROBES]
    except Exception:  # whatever it raises, there is no second reading then
        return None


def _pieces(file: Path) -> list[list[int]] | None:
    """What a sentencepiece model makes of the probe texts; None: there is none."""
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(file.read_bytes())
    except (OSError, RuntimeError):
        return None
    return [list(processor.encode(text, out_type=int)) for text in PROBES]


def _hash_of_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        data = file.read_bytes()
        digest.update(f"{file.name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def first_format(tokenizer: TextTokenizer) -> str | None:
    """The fingerprint that releases before this one gave the tokenizer; None: it has none.

    They hashed files and let transformers read them. Where that made other tokens of a probe text, None too: what was
    prepared then is not what this tokenizer makes.
    """
    path = tokenizer.path
    if isinstance(tokenizer, SentencePieceTokenizer):
        added = path.with_name("added_tokens.json")
        return _hash_of_files([path, added] if added.is_file() else [path])
    if not isinstance(tokenizer, HfTokenizer):
        return None
    if _transformers(path) != [tokenizer.encode(text) for text in PROBES]:
        return None
    return _hash_of_files([path / name for name in _FILES if (path / name).is_file()])


def same_tokens(tokenizer: TextTokenizer, fingerprint: str, eos: int) -> bool:
    """Whether tokens recorded with this fingerprint and end-of-text token are those that the tokenizer makes.

    True of the first format's fingerprint too, of unchanged files: prepared text stays of use.
    """
    if fingerprint == tokenizer.fingerprint:
        return True
    try:
        return eos == tokenizer.eos_id and fingerprint == first_format(tokenizer)
    except (OSError, DataError):
        return False
