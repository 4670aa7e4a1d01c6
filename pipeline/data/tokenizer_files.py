"""The JSON files of a tokenizer folder: read strictly, and what they say of the tokens that begin and end a text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parallel.errors import DataError
from pipeline.storage.lfs import is_pointer

CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_AGAIN = "copy the model's again"


def read_bytes(file: Path) -> bytes:
    """The bytes of a tokenizer's file.

    Raises:
        DataError: it cannot be read, or is a Git LFS pointer.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); {_AGAIN}.") from error
    if is_pointer(data):
        raise DataError(f"{file}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder.")
    return data


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        DataError: it cannot be read, begins with a byte-order mark, or holds something else than an object.
    """
    data = read_bytes(file)
    if data[:3] == b"\xef\xbb\xbf" or data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(
            f"{file}: begins with a byte-order mark, which readers of JSON refuse; save it as UTF-8 without one."
        )
    try:
        record = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is not JSON ({' '.join(str(error).split())[:200]}); {_AGAIN}.") from error
    if not isinstance(record, dict):
        raise DataError(f"{file}: is not a JSON object; {_AGAIN}.")
    return record


class SpecialTokens:
    """What the files beside a tokenizer say of its special tokens.

    Args:
        folder: read for tokenizer_config.json, special_tokens_map.json, added_tokens.json, and, for ids alone,
            generation_config.json and config.json.

    Attributes:
        ids: ids by content of the tokens that added_tokens_decoder and added_tokens.json list.

    Raises:
        DataError: one of the files is damaged, or lists no token ids.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read = {name: read_json(folder / name) for name in (CONFIG, SPECIAL, ADDED) if (folder / name).is_file()}
        self.ids: dict[str, int] = {}
        decoder = self._read.get(CONFIG, {}).get("added_tokens_decoder") or {}
        for name, pairs in (
            (ADDED, lambda: self._read.get(ADDED, {}).items()),
            (CONFIG, lambda: [(_content(token), number) for number, token in dict(decoder).items()]),
        ):
            try:
                self.ids |= {content: int(number) for content, number in pairs()}
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise DataError(f"{folder / name}: holds no token ids ({error}); {_AGAIN}.") from error

    def contents(self, role: str) -> Iterator[tuple[Path, str]]:
        """File and content of the token that serves as `role` ("eos", "bos"), what counts most first."""
        for name in (CONFIG, SPECIAL):
            token = self._read.get(name, {}).get(f"{role}_token")
            if token is not None:
                try:
                    yield self._folder / name, _content(token)
                except (TypeError, KeyError) as error:
                    raise DataError(
                        f"{self._folder / name}: its {role}_token is {token!r}; write the token's text."
                    ) from error

    def number(self, role: str) -> int | None:
        """The id that generation_config.json or config.json gives the token; of several the first."""
        for name in ("generation_config.json", "config.json"):
            if (self._folder / name).is_file():
                number = read_json(self._folder / name).get(f"{role}_token_id")
                number = number[0] if isinstance(number, list) and number else number
                if type(number) is int and number >= 0:
                    return number
        return None


def _content(token: Any) -> str:
    """Text of a token: a string, or the dictionary of an AddedToken."""
    content = token["content"] if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise TypeError(f"{content!r} is no text")
    return content
