"""What a pre-tokenizer's regular expression may hold together, found from the expression itself.

A tokenizer splits text by the matches of an expression such as `'s| ?\\p{L}+| ?\\p{N}+|\\s+(?!\\S)|\\s+`. Whether a
match can contain two characters side by side follows from which of its character classes may stand next to each other
(the follow sets of Glushkov's automaton). Where none can, a text may be split between these two characters first, and
searched part by part: the matches are the same. Python has no reader of Oniguruma's syntax, so the part of it that
tokenizers use is read here, and the engine itself says what a class contains. Anything else is `UnknownPattern`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from tokenizers import Regex, pre_tokenizers

_LAST_BLANKS = r"\s+(?!\S)"
"""White space but for its last character: looks one character ahead, and only after white space."""
_LOOKS_AROUND = re.compile(r"\(\?[=!<>]")
_ESCAPE = re.compile(
    r"\\(?:[sSdDwWhHnrtfv]|[pP]\{\^?\w+\}|x\{[0-9A-Fa-f]+\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[^\w\s])", re.ASCII
)
_REPEAT = re.compile(r"(?:\*|\+|\?|\{(?P<least>\d*)(?P<comma>,?)(?P<most>\d*)\})[?+]?")
_POSSESSIVE = re.compile(r"[*+?}]\+")

_Part = tuple[bool, frozenset[int], frozenset[int]]
"""Of a part of an expression: whether it may be empty, the atoms it may begin with, and those it may end with."""
_NOTHING: _Part = (True, frozenset(), frozenset())


class UnknownPattern(Exception):
    """The expression uses what is not understood here."""


class SplitPattern:
    """The regular expression (Oniguruma's syntax), or the literal text, of a `Split`, `Replace` or the like.

    Raises:
        UnknownPattern: the expression uses what is not understood here.
    """

    def __init__(self, source: str, literal: bool = False) -> None:
        self._literal = source if literal else None
        self._source = re.sub(r"([^\w\s])", r"\\\1", source) if literal else source
        self._looks_ahead = not literal and _LAST_BLANKS in source
        self._text = self._source.replace(_LAST_BLANKS, r"\s+")
        if not literal and _LOOKS_AROUND.search(self._text):
            raise UnknownPattern(source)
        self._at = 0
        self._atoms: list[tuple[str, bool]] = []
        self._follow: set[tuple[int, int]] = set()
        self._contains: Callable[[int, str], bool] = cache(self._atom_contains)
        if literal:
            return
        empty, _, _ = self._alternatives(False)
        if empty or self._at != len(self._text):
            raise UnknownPattern(source)

    def joins(self, left: str, right: str) -> bool:
        """Whether a match may contain these two characters side by side."""
        if self._literal is not None:
            return left + right in self._literal
        return any(self._contains(one, left) and self._contains(two, right) for one, two in self._follow)

    def touches(self, character: str) -> bool:
        """Whether a match may contain this character."""
        if self._literal is not None:
            return character in self._literal
        return any(self._contains(atom, character) for atom in range(len(self._atoms)))

    def always_takes(self, character: str, begins: bool) -> bool:
        """Whether wherever this character stands it is part of a match; call with what no match joins.

        Args:
            begins: no match contains the character together with the one before it; otherwise with the one after it.
        """
        # Before a character that no match of it reaches, a match is found exactly where it is with nothing after it.
        if begins and (self._looks_ahead or _POSSESSIVE.search(self._source)):
            return False
        return not pre_tokenizers.Split(Regex(self._source), "removed").pre_tokenize_str(character)

    def _atom_contains(self, atom: int, character: str) -> bool:
        source, folded = self._atoms[atom]
        if folded:
            # One character may fold to several, or several to one; those letters are no ASCII.
            if not character.isascii():
                return True
            source = f"(?i:{source})"
        return not pre_tokenizers.Split(Regex(source), "removed").pre_tokenize_str(character)

    def _alternatives(self, folded: bool) -> _Part:
        empty, first, last = self._sequence(folded)
        while self._text.startswith("|", self._at):
            self._at += 1
            more = self._sequence(folded)
            empty, first, last = empty or more[0], first | more[1], last | more[2]
        return empty, first, last

    def _sequence(self, folded: bool) -> _Part:
        whole = _NOTHING
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            part = self._repeated(folded)
            self._follow |= {(one, two) for one in whole[2] for two in part[1]}
            whole = (
                whole[0] and part[0],
                whole[1] | part[1] if whole[0] else whole[1],
                part[2] | whole[2] if part[0] else part[2],
            )
        return whole

    def _repeated(self, folded: bool) -> _Part:
        empty, first, last = self._single(folded)
        while found := _REPEAT.match(self._text, self._at):
            self._at = found.end()
            sign, least, most = found.group()[0], found["least"], found["most"]
            if sign == "{" and not least and not most:
                raise UnknownPattern(self._source)
            once = sign == "?" or (most or ("" if found["comma"] else least)) == "1"
            # A plus makes other repeats possessive, and repeats a counted one.
            if not once or (sign == "{" and found.group().endswith("+")):
                self._follow |= {(one, two) for one in last for two in first}
            empty = empty or sign in "*?" or (sign == "{" and int(least or 0) == 0)
        return empty, first, last

    def _single(self, folded: bool) -> _Part:
        text, start = self._text, self._at
        if text[start] == "(":
            opening = next((opening for opening in ("(?:", "(?i:") if text.startswith(opening, start)), "(")
            self._at += len(opening)
            if opening == "(" and text.startswith("?", self._at):
                raise UnknownPattern(self._source)
            part = self._alternatives(folded or opening == "(?i:")
            if not text.startswith(")", self._at):
                raise UnknownPattern(self._source)
            self._at += 1
            return part
        if text[start] == "[":
            self._at = self._class_end(start)
        elif text[start] == "\\":
            found = _ESCAPE.match(text, start)
            if found is None:
                raise UnknownPattern(self._source)
            self._at = found.end()
        elif text[start] in "^$*+?{":
            raise UnknownPattern(self._source)
        else:
            self._at += 1
        self._atoms.append((text[start : self._at], folded))
        atom = frozenset({len(self._atoms) - 1})
        return False, atom, atom

    def _class_end(self, start: int) -> int:
        depth, at = 0, start
        while at < len(self._text):
            character = self._text[at]
            if character == "\\":
                at += 1
            elif character == "[":
                depth += 1
                # A bracket that closes nothing: `[]a]` and `[^]a]` hold it.
                at += self._text.startswith("^", at + 1)
                at += self._text.startswith("]", at + 1)
            elif character == "]":
                depth -= 1
                if not depth:
                    return at + 1
            at += 1
        raise UnknownPattern(self._source)
