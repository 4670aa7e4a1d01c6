"""The small files of a model folder: JSON, tokenizer, generation settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError
from pipeline.storage.json_file import read_object, write_json
from pipeline.storage.lfs import refuse_pointer

GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE,
    "chat_template.json",
    GENERATION,
)
"""Files beside the weights that belong to a model and are copied with it."""


SHORT = 20
"""transformers' default `max_length`, which no one meant as a context."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder with none of these has no tokenizer."""


def check_companions(folder: Path) -> None:
    """Refuse files beside the weights that could not be copied or changed later, when training is over.

    tokenizer.json and vocab.json are only looked at for being there: who tokenizes parses them.

    Raises:
        CheckpointError: one is a Git LFS pointer, no JSON, or starts with a byte order mark.
    """
    for path in (folder / name for name in COMPANIONS):
        if path.is_file() and path.suffix == ".json" and path.name not in TOKENIZERS:
            read_object(path)
        refuse_pointer(path)


def has_tokenizer(place: Path) -> bool:
    """Whether a folder has tokenizer files, or a sentencepiece model is there."""
    return place.is_file() or any((place / name).is_file() for name in TOKENIZERS)


def _tokenizer_files(place: Path) -> dict[str, Path]:
    """Name in a model's folder -> file of the tokenizer at `place`, a folder or a sentencepiece model."""
    if place.name == "tokenizer.json":
        place = place.parent
    if place.is_file():
        found = {"tokenizer.model": place, "added_tokens.json": place.with_name("added_tokens.json")}
    else:
        found = {name: place / name for name in COMPANIONS if name != GENERATION}
    return {name: path for name, path in found.items() if path.is_file()}


def copy_companions(source: Path, target: Path, context: int | None = None, tokenizer: Path | None = None) -> None:
    """Copy tokenizer and generation files that exist; raise the tokenizer's length limit to `context` where it is
    lower, and leave out `auto_map`, which asks for code that is not copied.

    Args:
        tokenizer: a folder, or sentencepiece model, whose tokenizer, if it has one, is taken instead: never files of
            both.
    """
    files = _tokenizer_files(tokenizer if tokenizer is not None and has_tokenizer(tokenizer) else source)
    if (source / GENERATION).is_file():
        files[GENERATION] = source / GENERATION
    for name, path in files.items():
        shutil.copyfile(path, target / name)
    if (settings_file := files.get("tokenizer_config.json")) is not None:
        settings = read_object(settings_file)
        plain = without_code(settings)
        if context is not None and isinstance(plain.get("model_max_length"), int):
            plain["model_max_length"] = max(plain["model_max_length"], context)
        if plain != settings:
            write_json(target / settings_file.name, plain)
    if context is not None and GENERATION in files:
        settings = read_object(files[GENERATION])
        # Llama-2's says 4096, its context: left there, generate() would stop a prompt of 32k at once.
        if isinstance(settings.get("max_length"), int) and SHORT < settings["max_length"] < context:
            write_json(target / GENERATION, {**settings, "max_length": context})


def chat_template_in(folder: Path) -> str | None:
    """The chat template that readers of a folder take; None: it has none."""
    own = folder / TEMPLATE
    if own.is_file():
        return own.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = read_object(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def set_chat_template(folder: Path, template: str) -> None:
    """Make it the chat template of a tokenizer's folder, if there is one and it is not that already."""
    if not template or chat_template_in(folder) == template or not has_tokenizer(folder):
        return
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    config = folder / "tokenizer_config.json"
    settings = read_object(config) if config.is_file() else {}
    if settings.pop("chat_template", None) is not None:  # some readers look there first
        write_json(config, settings)


def ends_of_text(folder: Path) -> tuple[int, ...]:
    """Ids at which generate() of transformers stops for a model's folder: those of generation_config.json, or, where
    that names none or is missing, of config.json."""
    for path in (folder / GENERATION, folder / "config.json"):
        found = read_object(path).get("eos_token_id") if path.is_file() else None
        ends = found if isinstance(found, list) else [found]
        if any(type(end) is int for end in ends):
            return tuple(end for end in ends if type(end) is int)
    return ()


def set_answer_ends(folder: Path, base: Path, ends: Sequence[int]) -> None:
    """Have whoever generates stop at these tokens too: vLLM and transformers read them in generation_config.json.

    Args:
        folder: has the base's generation_config.json if there is one.
        base: the base model's folder.
    """
    known = ends_of_text(base)
    if set(ends) <= set(known):
        return
    path, of_base = folder / GENERATION, base / "config.json"
    declared = read_object(of_base) if of_base.is_file() else {}
    # What transformers takes from config.json where there is no such file.
    taken = {name: declared[name] for name in ("bos_token_id", "pad_token_id") if declared.get(name) is not None}
    settings = read_object(path) if path.is_file() else taken
    write_json(path, {**settings, "eos_token_id": [*known, *(end for end in ends if end not in known)]})


def without_code(settings: Mapping[str, Any]) -> dict[str, Any]:
    """config.json or tokenizer_config.json without `auto_map`: classes in files that are neither run nor copied."""
    return {key: value for key, value in settings.items() if key != "auto_map"}


def _edit(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file, made where it is missing."""
    settings = read_object(path) if path.is_file() else {}
    write_json(path, {**settings, **fields})


def tokenizer_size(place: Path) -> int | None:
    """One more than the largest token id of the tokenizer at `place`, as its files tell; None: there is none.

    Args:
        place: a folder, or a sentencepiece model.

    Raises:
        CheckpointError: a file is damaged.
    """
    files = _tokenizer_files(place)
    read: Path | None = None
    try:
        if (read := files.get("tokenizer.json")) is not None:
            whole = read_object(read)
            vocab = whole["model"]["vocab"]
            ids = [item["id"] for item in whole.get("added_tokens") or []]
            ids += vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]
        elif (read := files.get("tokenizer.model")) is not None:
            from sentencepiece import SentencePieceProcessor  # only when one is used

            refuse_pointer(read)
            ids = [int(SentencePieceProcessor(model_file=str(read)).vocab_size()) - 1]
        elif (read := files.get("vocab.json")) is not None:
            ids = [*read_object(read).values()]
        else:
            return None
        largest = int(max(ids))
        ids = []
        if "tokenizer.json" not in files and (read := files.get("added_tokens.json")) is not None:
            ids += read_object(read).values()
        if (read := files.get("tokenizer_config.json")) is not None:
            ids += map(int, read_object(read).get("added_tokens_decoder") or ())
        return max(largest, *ids, -1) + 1
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{read}: tells no token ids ({reason}); copy the model's tokenizer again.") from None


def check_vocabulary(place: Path, rows: int, mend: str) -> None:
    """Refuse a tokenizer of more tokens than the embedding has rows: one of them would read beyond its end.

    Args:
        place: see `tokenizer_size`.
        mend: what to do, for the sentence.

    Raises:
        CheckpointError: it has; or a file is damaged.
    """
    size = tokenizer_size(place)
    if size is not None and size > rows:
        raise CheckpointError(f"{place}: its tokenizer has {size} tokens and the embedding {rows} rows; {mend}.")


def add_pad_token(folder: Path, token: str) -> bool:
    """Give a tokenizer folder a padding token with the next free id, as LongLoRA's scripts do ("[PAD]", 32000).

    Works on the files: tokenizer.json (fast tokenizers), and the JSON files beside a sentencepiece tokenizer.model.

    Returns:
        False where the folder has no tokenizer, or one with a padding token or this token: nothing is changed.
    """
    number = tokenizer_size(folder)
    config = folder / "tokenizer_config.json"
    settings = read_object(config) if config.is_file() else {}
    fast, plain = folder / "tokenizer.json", folder / "tokenizer.model"
    if settings.get("pad_token") is not None or number is None:
        return False
    entry = {"content": token, "special": True}
    entry |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    if fast.is_file():
        whole = read_object(fast)
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
