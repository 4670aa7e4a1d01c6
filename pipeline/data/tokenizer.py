"""Text to token ids: a folder's tokenizer.json, or its sentencepiece model, behind one small protocol.

The tokens are those of the file itself, read by the library that defines it. transformers is not asked: its classes
rebuild a tokenizer from the name of its class or of the model, and need not keep to tokenizer.json (see `readings`).
Text is data: a literal "</s>" or "<|im_end|>" inside a document is tokenized as the characters it is, never as the
control token, so only `eos_id` written by us ends a document. No code from the folder runs and nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from parallel.errors import ConfigError, DataError
from pipeline.config.hub import MODEL, not_there
from pipeline.data.cuts import FastRule, PieceRule, Rule
from pipeline.data.token_identity import fast_identity, piece_identity
from pipeline.data.tokenizer_files import SpecialTokens, read_bytes, read_json

_UNMATCHABLE = "\U0010ffff"
"""A code point that stands for no character, so that no text holds it."""
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
"""First line of the other kind of file that is called tokenizer.model."""


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
        """sha256 (hex) of what decides which ids a text becomes, see `token_identity`."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without any special token."""

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """The same of several texts, which costs less than one by one."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out; bytes that are no whole character come as U+FFFD."""

    def may_cut(self, left: str, right: str) -> bool:
        """Whether any text may be cut between these two characters and tokenized in parts, see `encode_after`."""


def encode_after(tokenizer: TextTokenizer, parts: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Token ids of texts, each as the part of a document that goes on after a character.

    Args:
        parts: that last character before a place where `may_cut` allows a cut, "" where a document begins; the text.
    """
    # What a tokenizer does to the beginning of a text (a space put before it) happens to `left`.
    before = {left: tokenizer.encode(left) for left in {left for left, _ in parts} if left}
    rows = tokenizer.encode_all([left + text for left, text in parts])
    for number, (left, _) in enumerate(parts):
        if left:
            row, first = rows[number], before[left]
            assert row[: len(first)] == first, "may_cut allowed a cut that is none"
            rows[number] = row[len(first) :]
    return rows


class HfTokenizer:
    """A tokenizer.json, read by the tokenizers library itself.

    Args:
        folder: that holds it. One with vocab.json or the like instead is converted by transformers: it says nothing of
            how text is split, only the class of that name does.

    Attributes:
        settings: content of tokenizer.json as the folder has it.
        whole: the library's tokenizer as transformers has it, which makes special tokens of their spelling and puts
            around a text what tokenizer.json says.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.path = folder
        special = SpecialTokens(folder)
        file = folder / "tokenizer.json"
        record = read_json(file) if file.is_file() else _converted(folder)
        if (folder / "tokenizer.model").is_file():
            # An export takes it along, and other programs read it.
            _read_pieces(folder / "tokenizer.model", tiktoken=True)
        try:
            ends = {content for role in ("eos", "bos") for _, content in special.contents(role)}
            self.settings, self._record = record, _text_alone(record, ends)
            self._tokenizer = Tokenizer.from_str(json.dumps(self._record, ensure_ascii=False))
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exception, and the record may hold anything
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{folder}: its tokenizer does not load ({reason}); copy the model's again.") from error
        self._tokenizer.encode_special_tokens = True
        numbers = self._tokenizer.get_vocab(True).values()
        if not numbers:
            raise DataError(f"{folder}: its tokenizer has an empty vocabulary; copy the model's tokenizer files again.")
        self.vocab_size = max([*numbers, *special.ids.values()]) + 1
        self.eos_id = _required(folder, special, "eos", self._number_of)
        self.bos_id = _optional(special, "bos", self._number_of)
        self.fingerprint = fast_identity(self._record, self.eos_id, self.encode)
        self._rule: Rule = FastRule(self._record)

    def _number_of(self, content: str) -> int | None:
        number = self._tokenizer.token_to_id(content)
        return self._tokenizer.token_to_id(_UNMATCHABLE + content) if number is None else number

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without any special token."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """The same of several texts."""
        # Without the place of every token in the text, which takes more memory than all the rest.
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out; bytes that are no whole character come as U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    @cached_property
    def whole(self) -> Any:
        from tokenizers import Tokenizer

        whole = Tokenizer.from_str(json.dumps({**self.settings, "truncation": None, "padding": None}))
        ends = [whole.id_to_token(number) for number in (self.bos_id, self.eos_id) if number is not None]
        added = {token.content for token in whole.get_added_tokens_decoder().values()}
        whole.add_special_tokens([content for content in ends if content is not None and content not in added])
        return whole

    @cached_property
    def prompt_start(self) -> list[int]:
        """Ids the tokenizer itself puts before a prompt: BOS, or nothing."""
        plain, full = self.whole.encode("x", add_special_tokens=False).ids, self.whole.encode("x").ids
        starts = [at for at in range(len(full)) if full[at : at + len(plain)] == plain]
        return list(full[: starts[0]]) if starts else []

    def may_cut(self, left: str, right: str) -> bool:
        """Whether any text may be cut between these two characters and tokenized in parts."""
        return self._rule(left, right)


def _text_alone(record: dict[str, Any], ends: set[str]) -> dict[str, Any]:
    """A tokenizer.json that makes the same tokens of text, whole, and never a special one.

    Args:
        ends: contents of the tokens that begin and end a text, which are special whatever the record says.
    """
    added = [
        {**token, "special": token["special"] or token["content"] in ends} for token in record.get("added_tokens") or []
    ]
    special = {token["content"] for token in added if token["special"]}
    model = dict(record["model"])
    if not model.get("type"):  # as early releases wrote it
        model["type"] = "Unigram" if isinstance(model["vocab"], list) else "BPE" if "merges" in model else "WordLevel"
    kind = model["type"]
    renamed: set[str] = set()
    if kind != "BPE" or model.get("ignore_merges"):
        # These models look whole words up in their vocabulary, where the special ones may be listed too.
        merged = {part for merge in model.get("merges") or [] for part in _halves(merge)}
        merged |= {"".join(_halves(merge)) for merge in model.get("merges") or []}
        renamed = {text for text in special - merged if len(text) > 1 and not _BYTE_PIECE.fullmatch(text)}
    if renamed:

        def name(text: str) -> str:
            return _UNMATCHABLE + text if text in renamed else text

        if kind == "Unigram":
            model["vocab"] = [[name(text), score] for text, score in model["vocab"]]
        else:
            model["vocab"] = {name(text): number for text, number in model["vocab"].items()}
            model["unk_token"] = name(model["unk_token"]) if model.get("unk_token") else model.get("unk_token")
        added = [{**token, "content": name(token["content"])} for token in added]
    return {
        **record,
        "model": model,
        "added_tokens": added,
        "truncation": None,
        "padding": None,
        "post_processor": None,  # it adds special tokens, and changes no other
    }


def _halves(merge: Any) -> list[str]:
    return merge.split(" ", 1) if isinstance(merge, str) else list(merge)


def _converted(folder: Path) -> dict[str, Any]:
    # Seconds of import that nobody else needs.
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return dict(json.loads(loaded.backend_tokenizer.to_str()))
    except Exception as error:  # transformers and tokenizers raise bare Exception for damaged files
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{folder}: its tokenizer does not load ({reason}); copy the model's again, tokenizer.json if it has one."
        ) from error


def _optional(special: SpecialTokens, role: str, number_of: Any) -> int | None:
    """The token that serves as `role` by the files of the folder; None: they name none that there is."""
    for _, content in special.contents(role):
        number = number_of(content)
        number = special.ids.get(content) if number is None else number
        if number is not None:
            return int(number)
    return special.number(role)


def _required(folder: Path, special: SpecialTokens, role: str, number_of: Any) -> int:
    number = _optional(special, role, number_of)
    if number is not None:
        return number
    for file, content in special.contents(role):
        raise DataError(f"{file}: its {role}_token {content!r} is no token of the tokenizer; name one that is.")
    raise DataError(f"{folder}: its tokenizer names no end-of-text token; set eos_token in tokenizer_config.json.")


def _read_pieces(file: Path, tiktoken: bool = False) -> tuple[Any, Any]:
    """The processor and the ModelProto of a sentencepiece model; (None, None) for tiktoken's kind if that will do."""
    # Only when one is used.
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    data = read_bytes(file)
    if tiktoken and _TIKTOKEN.match(data):
        return None, None
    processor, model = SentencePieceProcessor(), ModelProto()
    try:
        processor.LoadFromSerializedProto(data)
        model.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError is a bare Exception
        raise DataError(
            f"{file}: is not a readable sentencepiece model; copy it again, or use the folder's tokenizer.json."
        ) from error
    return processor, model


class SentencePieceTokenizer:
    """A sentencepiece .model file, read by the sentencepiece library itself.

    Args:
        file: the model. What the JSON files beside a tokenizer.model say of special tokens is read too.

    Attributes:
        control: its pieces that no text becomes, such as </s>.
    """

    def __init__(self, file: Path) -> None:
        self.path = file
        self._processor, model = _read_pieces(file)
        # Tokens beyond the model's own, such as LongLoRA's [PAD]: never made from text, but rows of the embedding.
        special = SpecialTokens(file.parent)
        self.vocab_size = max([int(self._processor.vocab_size()), *(number + 1 for number in special.ids.values())])
        eos = self._id_of(special, "eos")
        if eos is None:
            raise DataError(f"{file}: has no end-of-text piece; train the sentencepiece model with eos_id >= 0.")
        self.eos_id = eos
        self.bos_id = self._id_of(special, "bos")
        self.prompt_start = [] if self.bos_id is None else [self.bos_id]
        self.fingerprint = piece_identity(model, self.eos_id, self.encode)
        self._rule: Rule = PieceRule(model)
        self.control = [piece.piece for piece in model.pieces if piece.type == piece.CONTROL]

    def _id_of(self, special: SpecialTokens, role: str) -> int | None:
        for _, content in special.contents(role):
            number = int(self._processor.piece_to_id(content))
            if number != self._processor.unk_id():
                return number
            if content in special.ids:
                return special.ids[content]
        own = int(getattr(self._processor, f"{role}_id")())
        return own if own >= 0 else special.number(role)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without any special token."""
        return list(self._processor.encode(text, out_type=int, add_bos=False, add_eos=False))

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """The same of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out; bytes that are no whole character come as U+FFFD."""
        return str(self._processor.decode(list(ids)))

    def may_cut(self, left: str, right: str) -> bool:
        """Whether any text may be cut between these two characters and tokenized in parts."""
        return self._rule(left, right)


def load_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer at `path`.

    Args:
        path: a folder with tokenizer.json (or other Hugging Face tokenizer files), a folder with only tokenizer.model,
            or a sentencepiece .model file.

    Raises:
        DataError: there is none, it or a JSON file beside it is damaged, or it has no end-of-text token.
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
            f"{path}: no tokenizer there; give the model's folder (with tokenizer.json) or a sentencepiece .model file"
            f"{not_there(str(path), MODEL)}."
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
