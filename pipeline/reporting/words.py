"""Words that depend on a number."""

from __future__ import annotations


def counted(count: int, one: str, many: str = "", grouped: bool = False) -> str:
    """A count and what it counts: `1 document`, `2 documents`.

    Args:
        one: of one.
        many: of others; empty: `one` with an s.
        grouped: thousands are set apart by commas.
    """
    number = f"{count:,}" if grouped else str(count)
    return f"{number} {one if count == 1 else many or f'{one}s'}"
