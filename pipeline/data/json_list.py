"""The objects of one JSON list, a few at a time: a list of books does not fit the memory that a book does."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from parallel.errors import DataError

_CHUNK = 1 << 18
"""Bytes read at once; doubled while they do not end an object."""


def read_objects(stream: IO[bytes], file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Position, from 1, and value of every object of the list that a stream holds.

    Args:
        file: for messages.

    Raises:
        DataError: it is no list of objects in UTF-8.
    """
    text = _Text(stream, file)
    if text.next_mark() != "[":
        raise DataError(f"{file}: is not JSON (it begins with no list); mend it.")
    text.at += 1
    number = 0
    while True:
        mark = text.next_mark()
        if mark == "]" and number == 0:
            break
        number += 1
        where = f"{file}: record {number}"
        value = text.value(where)
        if not isinstance(value, dict):
            raise DataError(f"{where} is not a JSON object; mend or remove it.")
        yield number, value
        mark = text.next_mark()
        if mark == "]":
            break
        if mark != ",":
            raise DataError(f"{where} is followed by {mark!r}, not by a comma or the list's end; mend the file.")
        text.at += 1
    text.at += 1
    if text.next_mark():
        raise DataError(f"{file}: is not JSON (something follows the list's end); mend it.")


class _Text:
    """The part of the text that is not read yet."""

    def __init__(self, stream: IO[bytes], file: Path) -> None:
        self.at = 0
        self._stream, self._file = stream, file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._held = ""
        self._size = _CHUNK
        self._ended = False

    def _more(self) -> bool:
        """Read on; False at the end."""
        if self._ended:
            return False
        data = self._stream.read(self._size)
        self._ended = not data
        try:
            self._held = self._held[self.at :] + self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._file}: is not JSON in UTF-8 ({error.reason}); convert it.") from None
        self.at = 0
        return True

    def next_mark(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self.at < len(self._held):
                if not self._held[self.at].isspace():
                    return self._held[self.at]
                self.at += 1
            if not self._more():
                return ""

    def value(self, where: str) -> Any:
        """The value that begins here."""
        self._size = _CHUNK
        while True:
            try:
                value, self.at = json.JSONDecoder().raw_decode(self._held, self.at)
                return value
            except (ValueError, RecursionError) as error:
                # It may be cut: twice as much each time, so that a long object is not parsed over and over.
                self._size = max(_CHUNK, len(self._held) - self.at)
                if isinstance(error, RecursionError) or not self._more():
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                    raise DataError(f"{where} is not JSON ({reason}); mend or remove it.") from None
