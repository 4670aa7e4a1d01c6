"""Text to token ids: a Hugging Face tokenizer folder, or a sentencepiece model, behind one small protocol.

Text is data: a literal "</s>" or "<|im_end|>" inside a document is tokenized as the characters it is, never as the
control token, so only `eos_id` written by us ends a document. No code from the folder runs and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from parallel.errors import ConfigError, DataError

_HF_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


class TextTokenizer(Protocol):
    """What the data pipeline needs of a tokenizer."""

    @property
    def path(self) -> Path:
        """Where it was loaded from, so that worker processes can load it too."""

    @property
    def eos_id(self) -> int:
        """Token that ends a document."""

    @property
    def bos_id(self) -> int | None:
        """Token that starts a prompt; None if the tokenizer has none."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included."""

    @property
    def prompt_start(self) -> Sequence[int]:
        """Ids the tokenizer itself puts before a prompt: BOS, or nothing."""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the names and contents of the tokenizer's files."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without any special token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no whole character come as U+FFFD."""


def _fingerprint(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        data = file.read_bytes()
        # Name and length first, so that bytes cannot move between files unnoticed.
        digest.update(f"{file.name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


class HfTokenizer:
    """A tokenizer that transformers loads from a folder."""

    def __init__(self, folder: Path) -> None:
        # Seconds of import that a sentencepiece user, the planner and the tests' error paths do not need.
        from transformers import AutoTokenizer

        self.path = folder
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # transformers and tokenizers raise bare Exception for damaged files
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{folder}: its tokenizer does not load ({reason}); copy the model's again.") from error
        ids = self._tokenizer.get_vocab().values()
        if not ids:
            raise DataError(f"{folder}: its tokenizer has an empty vocabulary; copy the model's tokenizer files again.")
        self.vocab_size = max(ids) + 1
        if self._tokenizer.eos_token_id is None:
            raise DataError(
                f"{folder}: its tokenizer names no end-of-text token; set eos_token in tokenizer_config.json."
            )
        self.eos_id = int(self._tokenizer.eos_token_id)
        bos = self._tokenizer.bos_token_id
        self.bos_id = None if bos is None else int(bos)
        plain, full = self.encode("x"), list(self._tokenizer("x")["input_ids"])
        starts = [at for at in range(len(full)) if full[at : at + len(plain)] == plain]
        self.prompt_start = full[: starts[0]] if starts else []
        self.fingerprint = _fingerprint([folder / name for name in _HF_FILES if (folder / name).is_file()])

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without any special token."""
        # verbose=False: a book is longer than model_max_length on purpose.
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
        return list(encoded["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no whole character come as U+FFFD."""
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


class SentencePieceTokenizer:
    """A sentencepiece .model file, read by the sentencepiece library itself."""

    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor  # only when one is used

        self.path = file
        self._processor: Any = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(file.read_bytes())
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{file}: is not a readable sentencepiece model; copy it again, or use the folder's tokenizer.json."
            ) from error
        self.vocab_size = int(self._processor.vocab_size())
        self.eos_id = int(self._processor.eos_id())
        if self.eos_id < 0:
            raise DataError(f"{file}: has no end-of-text piece; train the sentencepiece model with eos_id >= 0.")
        bos = int(self._processor.bos_id())
        self.bos_id = bos if bos >= 0 else None
        self.prompt_start = [] if self.bos_id is None else [self.bos_id]
        files, added = [file], file.with_name("added_tokens.json")
        if added.is_file():
            # Tokens beyond the model's own, such as LongLoRA's [PAD]: never made from text, but rows of the embedding.
            try:
                self.vocab_size = max([self.vocab_size, *(int(n) + 1 for n in json.loads(added.read_text()).values())])
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise DataError(f"{added}: holds no token ids ({error}); copy the model's again.") from error
            files.append(added)
        self.fingerprint = _fingerprint(files)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without any special token."""
        return list(self._processor.encode(text, out_type=int, add_bos=False, add_eos=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no whole character come as U+FFFD."""
        return str(self._processor.decode(list(ids)))


def load_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer at `path`.

    Args:
        path: a folder with tokenizer.json (or other Hugging Face tokenizer files), a folder with only tokenizer.model,
            or a sentencepiece .model file.

    Raises:
        DataError: there is none, it does not load, or it has no end-of-text token.
    """
    if path.is_file():
        if path.suffix == ".model":
            return SentencePieceTokenizer(path)
        if path.name == "tokenizer.json":
            return load_tokenizer(path.parent)
        raise DataError(
            f"{path}: is not a tokenizer; give a folder with tokenizer.json or a sentencepiece .model file."
        )
    if not path.is_dir():
        raise DataError(
            f"{path}: no tokenizer there; give the model's folder (with tokenizer.json) or a sentencepiece .model file."
        )
    if (path / "tokenizer.json").is_file():
        return HfTokenizer(path)
    if (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model")
    if (path / "tokenizer_config.json").is_file() or (path / "vocab.json").is_file():
        return HfTokenizer(path)
    raise DataError(
        f"{path}: holds no tokenizer; copy the model's tokenizer.json and tokenizer_config.json (or its "
        "sentencepiece tokenizer.model) into it."
    )


def check_rows(tokenizer: TextTokenizer, rows: int) -> None:
    """Refuse a tokenizer of more tokens than the model's embedding has rows.

    Raises:
        ConfigError: it is another model's, or tokens were added to it.
    """
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            f"data.tokenizer: has {tokenizer.vocab_size} tokens, the model {rows}; use the model's own tokenizer, or "
            f"set model.vocab: {tokenizer.vocab_size} if tokens were added to it."
        )
