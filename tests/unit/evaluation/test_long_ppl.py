"""LongPPL against its definition, token by token, on a model whose likelihoods are known in closed form."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from parallel.errors import ConfigError, DataError
from pipeline.evaluation.long_ppl import LongPpl, measure_long_ppl
from pipeline.evaluation.spread import Shards


def copying(tokens_BS: torch.Tensor) -> torch.Tensor:
    """Loss 0.5 for a token that stands earlier in what is read, 4 otherwise."""
    rows = [[0.5 if row[at] in row[:at] else 4.0 for at in range(1, len(row))] for row in tokens_BS.tolist()]
    return torch.tensor(rows)


def guessing(tokens_BS: torch.Tensor) -> torch.Tensor:
    """The same loss everywhere."""
    return torch.full((1, tokens_BS.shape[1] - 1), 3.0)


def by_definition(window: list[int], short: int, stride: int) -> list[int]:
    """Positions where the long context brings more than 2 nats and the log-likelihood is above -2."""
    found, scored = [], short
    while scored < len(window):
        end = min(scored + stride, len(window))
        begin = max(0, end - short)
        for at in range(scored, end):
            long = 0.5 if window[at] in window[:at] else 4.0
            near = 0.5 if window[at] in window[begin:at] else 4.0
            if near - long > 2 and -long > -2:
                found.append(at)
        scored = end
    return found


@pytest.fixture
def windows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 40, (3, 60), generator=generator)


def test_the_keys_are_those_of_the_definition(windows: torch.Tensor, tmp_path: Path) -> None:
    found = measure_long_ppl(copying, windows, 16, None, label="a", step=1)
    expected = tuple(tuple(by_definition(row, 16, 4)) for row in windows.tolist())
    assert found.keys == expected and sum(map(len, expected)) > 20 and min(min(row) for row in expected) >= 16
    assert found.nll == pytest.approx(0.5) and found.perplexity == pytest.approx(math.exp(0.5))
    found.write(tmp_path / "a.json")
    assert LongPpl.read(tmp_path / "a.json") == found

    # Another model is judged at the same tokens: one that reads nothing has the perplexity of its guess.
    other = measure_long_ppl(guessing, windows, 16, found, label="b", step=2)
    assert other.keys == found.keys and other.nll == pytest.approx(3.0)
    alone = measure_long_ppl(guessing, windows, 16, None, label="b", step=2)
    assert not any(alone.keys) and math.isnan(alone.perplexity), "a long context helps it nowhere"


def test_ranks_find_what_one_process_finds(windows: torch.Tensor) -> None:
    whole = measure_long_ppl(copying, windows, 16, None, label="a", step=1)
    parts: list[torch.Tensor] = []

    def keep(table: torch.Tensor) -> torch.Tensor:
        parts.append(table.clone())
        return table

    for rank in range(2):
        measure_long_ppl(copying, windows, 16, None, label="a", step=1, shards=Shards(rank, 2, keep, lockstep=True))
    total = parts[0] + parts[1]
    summed = Shards(0, 2, lambda table: total)
    assert measure_long_ppl(copying, windows, 16, None, label="a", step=1, shards=summed) == whole


def test_wrong_windows_are_refused(windows: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="windows of 60 tokens are no longer than the short context of 60"):
        measure_long_ppl(copying, windows, 60, None, label="a", step=1)
    keys = measure_long_ppl(copying, windows, 16, None, label="a", step=1)
    with pytest.raises(DataError, match="are of other text or windows than these 3 of 59"):
        measure_long_ppl(copying, windows[:, 1:], 16, keys, label="a", step=1)
