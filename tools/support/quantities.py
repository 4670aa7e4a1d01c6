"""Numbers as people write them: 32k, 1M, 2.1B, 1e6, 512GB, 8..4096."""

from __future__ import annotations

import re

from parallel.errors import ConfigError

NUMBER = r"(\d+(?:_\d{3})*(?:\.\d+)?(?:[eE]\+?\d+)?)"
_AMOUNT = re.compile(NUMBER + r"\s*([kKmMbBgGtT]?)(?:\s*tokens?)?")
_MEMORY = re.compile(NUMBER + r"\s*(?:([kKmMgGtT])(i?)[bB])?")
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(,\d{3})+")
_POWERS = {"": 0, "k": 1, "m": 2, "b": 3, "g": 3, "t": 4}
MOST_TOKENS = 1 << 26
"""Of a sequence that is planned for: the time to plan grows with them."""
SUCH_AS = "write a number such as 32768, 32k, 1M or 2.1B"


def quantity(flag: str, text: str, unit: int, such_as: str = SUCH_AS) -> int:
    """A number with an optional k, M, B or T.

    Args:
        flag: the option, for the sentence.
        unit: what k stands for: 1024 for lengths, 1000 for amounts.
        such_as: what to write instead.

    Raises:
        ConfigError: it is none, or not positive.
    """
    match = _AMOUNT.fullmatch(text.strip())
    exact = float(match[1]) * unit ** _POWERS[match[2].lower()] if match else 0.0
    value = round(exact) if exact < 1e18 else 0
    if value < 1 or (match is not None and not match[2] and value != exact):
        raise ConfigError(f"{flag}: {text} is no amount; {such_as}.")
    return value


def memory(flag: str, text: str) -> int:
    """Bytes, in GiB where no unit is given.

    Raises:
        ConfigError: it is no amount of memory.
    """
    match = _MEMORY.fullmatch(text.strip())
    if match is not None and match[2]:
        size = float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].lower()]
    else:
        size = float(match[1]) * 1024**3 if match else 0.0
    if not 1 <= size < float("inf"):
        raise ConfigError(f"{flag}: {text} is no amount of memory; write GiB such as 512, or a unit such as 512GB.")
    return round(size)


def spelled(amount: int) -> str:
    """An amount as `quantity` reads it, of three digits: 2.1B; what is beyond thousands of trillions in full."""
    for letter, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        # 999,600 is 1M, not 1e+03k.
        if amount >= 0.9995 * size:
            return f"{amount / size:.3g}{letter}" if amount < 999.5 * size else f"{amount / size:,.0f}{letter}"
    return str(amount)


def counts(flag: str, text: str, unit: int = 1000, such_as: str = SUCH_AS) -> tuple[int, ...]:
    """One number, several (8,16), or a range that doubles (8..4096); rising.

    Raises:
        ConfigError: it is none of these.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.partition("..")
        low = quantity(flag, first, unit, such_as)
        high = quantity(flag, last, unit, such_as) if dots else low
        if high < low:
            raise ConfigError(f"{flag}: {part} ends below its beginning; write the smaller number first.")
        while low <= high:
            found.add(low)
            low *= 2
    return tuple(sorted(found))


def lengths(flag: str, text: str) -> tuple[int, ...]:
    """Tokens, one number or several.

    Raises:
        ConfigError: it is none, or one number with commas in it.
    """
    if _THOUSANDS.fullmatch(text.strip()):
        raise ConfigError(f"{flag}: {text} reads as several lengths; write {text.strip().replace(',', '')} for one.")
    found = counts(flag, text, 1024)
    if found[-1] > MOST_TOKENS:
        raise ConfigError(f"{flag}: {text} is longer than is planned for; give at most {MOST_TOKENS >> 20}M tokens.")
    return found
