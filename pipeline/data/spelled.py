"""Text that spells special tokens, which plain text never becomes: counted, as it often is a chat that was rendered."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.data.tokenizer import HfTokenizer, SentencePieceTokenizer, TextTokenizer
from pipeline.reporting.words import counted


def special_contents(tokenizer: TextTokenizer) -> list[str]:
    """How the tokenizer's special tokens are spelled, in its order."""
    if isinstance(tokenizer, HfTokenizer):
        found = [token["content"] for token in tokenizer.settings.get("added_tokens") or [] if token.get("special")]
    elif isinstance(tokenizer, SentencePieceTokenizer):
        found = tokenizer.control
    else:
        found = []
    return [content for content in dict.fromkeys(found) if len(content) > 1]


class Spelled:
    """Counts documents that spell a special token; told of their text in order, in parts.

    A token whose spelling is cut by two parts is not seen.

    Attributes:
        documents: so many do.
        first: of the first one the token and its file, or None.
    """

    def __init__(self, contents: Iterable[str]) -> None:
        # Hundreds of tokens begin alike (<|reserved_...): most text is done with after a look for those beginnings.
        self._groups: dict[str, list[str]] = {}
        for content in contents:
            self._groups.setdefault(content[:2], []).append(content)
        self._found = False
        self.documents = 0
        self.first: tuple[str, Path] | None = None

    def add(self, text: str, ends: bool, file: Path) -> None:
        """The next part of a document, and whether it ends there."""
        if not self._found:
            token = self._token_in(text)
            if token is not None:
                self._found = True
                self.documents += 1
                self.first = self.first or (token, file)
        if ends:
            self._found = False

    def _token_in(self, text: str) -> str | None:
        for beginning, contents in self._groups.items():
            if beginning in text:
                for content in contents:
                    if content in text:
                        return content
        return None

    def sentences(self) -> list[str]:
        """What to tell the user; nothing where no document does."""
        if self.first is None:
            return []
        count, (token, file) = self.documents, self.first
        return [
            f"{counted(count, 'document spells', 'documents spell')} a special token, which stays the "
            f"characters it is (first: {token!r} in {file})."
        ]
