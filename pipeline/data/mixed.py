"""Windows of several sources in fixed shares, in an order that is a function of seed and place alone.

Place p of a training run belongs to a source, and is the n-th of that source's places; both follow from p and the
weights by integer arithmetic, so that nothing is stored, nothing advances, and resuming at any place takes no longer
than beginning. Each source's own windows are read epoch after epoch, as those of a single one are.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parallel.errors import ConfigError
from pipeline.config.sources import SourceConfig
from pipeline.data.discovery import matched
from pipeline.data.packing import Window, Windows
from pipeline.data.sampler import permutation_of, windows_at
from pipeline.data.samples import SampleDataset, training_windows
from pipeline.data.shards import TokenShards


def whole_weights(weights: Sequence[Fraction]) -> list[int]:
    """The same proportions in whole numbers."""
    unit = lcm(*(weight.denominator for weight in weights))
    return [int(weight * unit) for weight in weights]


def turn(place: int, weights: Sequence[int]) -> tuple[int, int]:
    """Whose turn it is at a place, and how many turns that source had before.

    The first source has the places at which its share of them, rounded to the nearest, steps up; the places left to
    the others are shared out in the same way. With the heaviest first, the turns that a source of n had before any
    place differ from its share of them by less than (1 + 1 + 1/2 + ... + 1/(n - 1)) / 2.

    Args:
        place: from 0.
        weights: positive.

    Returns:
        Index of the source; turns of it before `place`.
    """
    left = sum(weights)
    for source, weight in enumerate(weights[:-1]):
        before = (2 * place * weight + left) // (2 * left)
        if (2 * (place + 1) * weight + left) // (2 * left) > before:
            return source, before
        place -= before
        left -= weight
    return len(weights) - 1, place


@dataclass(frozen=True)
class Share:
    """What a source is of a mixture."""

    path: str
    documents: int
    tokens: int
    windows: int
    share: float
    """Of the windows that are read, in (0, 1]."""
    chat: bool
    """Conversations, not text."""


class MixedWindows:
    """Windows of several sources, numbered one source after the other.

    Args:
        parts: windows of each source, all of one length.
        weights: of the sources, in the same order, positive.
    """

    def __init__(self, parts: Sequence[Windows], weights: Sequence[Fraction]) -> None:
        self.sequence = parts[0].sequence
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts]).tolist()
        self.shares = [weight / sum(weights) for weight in weights]
        self._by_weight = sorted(range(len(parts)), key=lambda number: -weights[number])
        self._weights = whole_weights([self.shares[number] for number in self._by_weight])
        self._permutations = [permutation_of(number) for number in range(len(parts))]

    @property
    def stores(self) -> tuple[TokenShards, ...]:
        """The token streams of the sources."""
        return tuple(store for part in self.parts for store in part.stores)

    def __len__(self) -> int:
        """Windows of all sources together."""
        return int(self._ends[-1])

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what the windows hold, and in which shares they are read."""
        lines = [f"{part.fingerprint} {share}" for part, share in zip(self.parts, self.shares, strict=True)]
        return hashlib.sha256("\n".join(["mixed 1", *lines]).encode()).hexdigest()

    def order(self, seed: int, first: int, count: int) -> NDArray[np.int64]:
        """Windows read at places [first, first + count) of a training run, int64 [count]; count is at least 1."""
        turns = [turn(place, self._weights) for place in range(first, first + count)]
        whose = np.array([self._by_weight[source] for source, _ in turns])
        nth = np.array([before for _, before in turns], np.int64)
        out = np.empty(count, np.int64)
        for number in np.unique(whose).tolist():
            here, windows = whose == number, len(self.parts[number])
            own = windows_at(seed, nth[here], windows, self._permutations[number])
            out[here] = self._ends[number] - windows + own
        return out

    def source_of(self, index: int) -> int:
        """Number of the source that window `index` is of."""
        return bisect_right(self._ends, index)

    def documents(self, index: int) -> list[int]:
        """Documents of window `index`, as its source counts them."""
        number = self.source_of(index)
        return self.parts[number].documents(index - self._ends[number] + len(self.parts[number]))

    def window(self, index: int, mask_documents: bool = False) -> Window:
        """Window `index`; document ids count within its source.

        Raises:
            IndexError: no such window.
            DataError: the shard holds an id outside the vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        number = self.source_of(index)
        part = self.parts[number]
        return part.window(index - self._ends[number] + len(part), mask_documents)


def packing_line(windows: Windows) -> str:
    """How full conversations make their windows, for the line that a run begins with; empty: there are none."""
    parts = windows.parts if isinstance(windows, MixedWindows) else [windows]
    shares = [f"{part.fill:.1%}" for part in parts if isinstance(part, SampleDataset)]
    return f"; conversations fill {' and '.join(shares)} of their windows" if shares else ""


def open_windows(
    sources: Sequence[SourceConfig], stores: Sequence[TokenShards], sequence: int, mask_documents: bool
) -> Windows:
    """The windows that training draws from: those of the one source, or of all in their shares.

    Raises:
        ConfigError: two sources hold the same; conversations would attend to each other.
        DataError: a source has no full window, or a conversation too long for one.
    """
    parts = [training_windows(store, sequence, mask_documents) for store in stores]
    if len(parts) == 1:
        return parts[0]
    _refuse_shared_files([Path(source.path) for source in sources])
    seen: dict[str, str] = {}
    for source, store in zip(sources, stores, strict=True):
        if store.fingerprint in seen:
            raise ConfigError(
                f"data.path: {source.path} holds the very tokens of {seen[store.fingerprint]}; name one of them, with "
                "a larger weight or more epochs if it is to be read more often."
            )
        seen[store.fingerprint] = source.path
    return MixedWindows(parts, weights_of(sources, [len(part) for part in parts]))


def _refuse_shared_files(sources: Sequence[Path]) -> None:
    """Raise ConfigError where a file that one pattern matches is of another source too; see also `check_sources`."""
    files = [matched(source) for source in sources]
    for number, one in enumerate(files):
        real = {file.resolve() for file in one or ()}
        for other, theirs in zip(sources, files, strict=True):
            if other == sources[number]:
                continue
            both = (
                real & {file.resolve() for file in theirs}
                if theirs is not None
                else {file for file in real if file.is_relative_to(other.resolve())}
            )
            if both:
                raise ConfigError(
                    f"data.path: {sources[number]} and {other} overlap, so {min(both)} would count twice; change the "
                    "pattern."
                )


def weights_of(sources: Sequence[SourceConfig], windows: Sequence[int]) -> list[Fraction]:
    """The sources' weights as they are written; without any, their epochs times their windows."""
    # Through text: 0.1 is a tenth, not the nearest number of 53 bits.
    return [
        Fraction(str(source.epochs or 1)) * count if source.weight is None else Fraction(str(source.weight))
        for source, count in zip(sources, windows, strict=True)
    ]


def shares_of(sources: Sequence[SourceConfig], windows: Windows) -> list[Share]:
    """What each source is of a mixture; of a single source nothing."""
    if not isinstance(windows, MixedWindows):
        return []
    return [
        Share(
            source.path,
            store.manifest.documents,
            store.manifest.tokens,
            len(part),
            float(share),
            store.scored is not None,
        )
        for source, store, part, share in zip(sources, windows.stores, windows.parts, windows.shares, strict=True)
    ]
