"""What a splitting expression is said to hold together, against the engine that splits by it."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from pipeline.data.split_regex import SplitPattern, UnknownPattern

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
)
PATTERNS = {
    "gpt-2": GPT2,
    "llama-3": LLAMA3,
    "gpt-4o": GPT4O,
    "deepseek": DEEPSEEK,
    "possessive": LLAMA3.replace("]?\\p{L}", "]?+\\p{L}").replace("[\\r\\n]*", "[\\r\\n]*+"),
    "han": r"[一-龥\u3040-ゟ゠-ヿ]+",
    "counted": r"a{2}|(?:cb){1}+x|(?:ab){1,2}c|[]x]{0,1} |\d{2,}\.",
    "groups": r"(a|b c)+(?:1| )?|(?i:K)\n",
    "class of classes": r"[a-z&&[^b]]+|[^\]a ]+",
}
LETTERS = "abcxK'sS1２ \n\r\t.]。一が\u212aſ\u00a0"


def pieces(pattern: str, text: str) -> list[str]:
    found = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)
    return [piece for piece, _ in found]


def matched(pattern: str, text: str) -> list[tuple[int, int]]:
    kept = pre_tokenizers.Split(Regex(pattern), "removed", invert=True).pre_tokenize_str(text)
    return [place for _, place in kept]


@pytest.mark.parametrize("name", PATTERNS)
def test_no_match_holds_what_none_may_hold(name: str) -> None:
    pattern = SplitPattern(PATTERNS[name])

    @settings(max_examples=300, deadline=None)
    @given(st.text(LETTERS, min_size=2, max_size=9))
    @example("abababc")
    @example("aaab c b c1")
    def check(text: str) -> None:
        held = {place for start, end in matched(PATTERNS[name], text) for place in range(start + 1, end)}
        taken = {place for start, end in matched(PATTERNS[name], text) for place in range(start, end)}
        for place in range(1, len(text)):
            left, right = text[place - 1], text[place]
            if place in held:
                assert pattern.joins(left, right) and pattern.touches(left) and pattern.touches(right)
            elif not pattern.joins(left, right) and not left.isspace():
                assert place - 1 in taken or not pattern.always_takes(left, False)
                assert place in taken or not pattern.always_takes(right, True)
                if pattern.always_takes(left, False):
                    apart = pieces(PATTERNS[name], text[:place]) + pieces(PATTERNS[name], text[place:])
                    assert pieces(PATTERNS[name], text) == apart

    check()


def test_words_come_apart_from_blanks() -> None:
    for name in ("gpt-2", "llama-3", "gpt-4o", "possessive"):
        pattern = SplitPattern(PATTERNS[name])
        for left, right in ("a ", "a\n", "1 ", "一\n", ". "):
            assert not pattern.joins(left, right) and pattern.always_takes(left, False), (name, left, right)
    assert SplitPattern(LLAMA3).joins(".", "\n") and not SplitPattern(GPT2).joins(".", "\n")


@pytest.mark.parametrize(
    "source",
    [r"a(?=b)", r"(?<=a)b", r"\s+(?!a)", r"^a", r"a$", r"\ba", r"(a)\1", r"(?>a)b", r"(?i)a", r"a{,}", r"\Ga", r"a(b"]
    + [r"[ab", r"a*", r"", r"a|", r"*a", r"(?#x)a", r"a)b", "\\"],
)
def test_what_is_not_understood(source: str) -> None:
    with pytest.raises(UnknownPattern):
        SplitPattern(source)


def test_literal_text() -> None:
    pattern = SplitPattern("a.b", literal=True)
    assert pattern.joins("a", ".") and not pattern.joins("b", "a") and pattern.touches("b") and not pattern.touches("x")
    assert SplitPattern(".", literal=True).always_takes(".", False)
    assert not SplitPattern(".", literal=True).always_takes("x", False)
