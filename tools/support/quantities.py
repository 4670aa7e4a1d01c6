"""Numbers as people write them: 32k, 1M, 2.1B, 8..4096."""

from __future__ import annotations

import re

from parallel.errors import ConfigError

_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMbBgG]?)")
_POWERS = {"": 0, "k": 1, "m": 2, "b": 3, "g": 3}


def quantity(flag: str, text: str, unit: int) -> int:
    """A number with an optional k, M or B.

    Args:
        flag: the option, for the sentence.
        unit: what k stands for: 1024 for lengths, 1000 for amounts.

    Raises:
        ConfigError: it is none, or not positive.
    """
    match = _TEXT.fullmatch(text.strip())
    exact = float(match[1]) * unit ** _POWERS[match[2].lower()] if match else 0.0
    value = round(exact)
    if value < 1 or (match is not None and not match[2] and value != exact):
        raise ConfigError(f"{flag}: {text} is no amount; write a number such as 32768, 32k, 1M or 2.1B.")
    return value


def counts(flag: str, text: str, unit: int = 1000) -> tuple[int, ...]:
    """One number, several (8,16), or a range that doubles (8..4096).

    Raises:
        ConfigError: it is none of these.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        low = quantity(flag, first, unit)
        high = quantity(flag, last, unit) if dots else low
        if high < low:
            raise ConfigError(f"{flag}: {part} ends below its beginning; write the smaller number first.")
        while low <= high:
            found.append(low)
            low *= 2
    return tuple(dict.fromkeys(found))
