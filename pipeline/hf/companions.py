"""The small files of a model folder: JSON, tokenizer, generation settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.storage.json_file import write_json

COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files beside the weights that belong to a model and are copied with it."""


SHORT = 20
"""transformers' default `max_length`, which no one meant as a context."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder with none of these has no tokenizer."""


def copy_companions(source: Path, target: Path, context: int | None = None, tokenizer: Path | None = None) -> None:
    """Copy tokenizer and generation files that exist; raise the tokenizer's length limit to `context` where it is
    lower.

    Args:
        tokenizer: a folder whose tokenizer, if it has one, is taken instead: never files of both.
    """
    own = tokenizer is not None and any((tokenizer / name).is_file() for name in TOKENIZERS)
    for name in COMPANIONS:
        origin = tokenizer if own and tokenizer is not None and name != "generation_config.json" else source
        if (origin / name).is_file():
            shutil.copyfile(origin / name, target / name)
    path = target / "tokenizer_config.json"
    if context is not None and path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(settings.get("model_max_length"), int) and settings["model_max_length"] < context:
            write_json(path, {**settings, "model_max_length": context})
    path = target / "generation_config.json"
    if context is not None and path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        # Llama-2's says 4096, its context: left there, generate() would stop a prompt of 32k at once.
        if isinstance(settings.get("max_length"), int) and SHORT < settings["max_length"] < context:
            write_json(path, {**settings, "max_length": context})


def _edit(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file, made where it is missing."""
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**settings, **fields})


def tokenizer_size(folder: Path) -> int | None:
    """One more than the largest token id of a tokenizer.json or tokenizer.model folder; None: it has neither."""
    fast, plain, added = (folder / name for name in ("tokenizer.json", "tokenizer.model", "added_tokens.json"))
    if fast.is_file():
        whole = json.loads(fast.read_text(encoding="utf-8"))
        vocab = whole["model"]["vocab"]
        ids = [item["id"] for item in whole.get("added_tokens") or []]
        ids += vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]
        return max(ids) + 1
    if plain.is_file():
        from sentencepiece import SentencePieceProcessor  # only when one is used

        size = int(SentencePieceProcessor(model_file=str(plain)).vocab_size())
        more = json.loads(added.read_text(encoding="utf-8")).values() if added.is_file() else []
        return max([size, *(number + 1 for number in more)])
    return None


def add_pad_token(folder: Path, token: str) -> bool:
    """Give a tokenizer folder a padding token with the next free id, as LongLoRA's scripts do ("[PAD]", 32000).

    Works on the files: tokenizer.json (fast tokenizers), and the JSON files beside a sentencepiece tokenizer.model.

    Returns:
        False where the folder has no tokenizer, or one with a padding token or this token: nothing is changed.
    """
    number = tokenizer_size(folder)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    fast, plain = folder / "tokenizer.json", folder / "tokenizer.model"
    if settings.get("pad_token") is not None or number is None:
        return False
    entry = {"content": token, "special": True}
    entry |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    if fast.is_file():
        whole = json.loads(fast.read_text(encoding="utf-8"))
        added = list(whole.get("added_tokens") or [])
        if any(item["content"] == token for item in added):
            return False
        whole["added_tokens"] = [*added, {"id": number, **entry}]
        # Not write_json: the order of a vocabulary's keys is part of some readers' behaviour.
        fast.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    if plain.is_file():
        _edit(folder / "added_tokens.json", **{token: number})
    decoder = {**settings.get("added_tokens_decoder", {}), str(number): entry}
    _edit(
        config, pad_token=token, **({"added_tokens_decoder": decoder} if settings.get("added_tokens_decoder") else {})
    )
    _edit(folder / "special_tokens_map.json", pad_token=token)
    return True
