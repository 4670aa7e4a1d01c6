"""Perplexity against plain oracles: what is scored, once, with how much context, alike on any number of ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import DataError
from pipeline.evaluation.perplexity import (
    EvalReport,
    LengthResult,
    cut_windows,
    evaluate,
    sliding_spans,
    sliding_window,
    whole_windows,
)
from pipeline.evaluation.spread import Shards, shard

VOCAB = 13


def text(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def prefix_nll(tokens_BS: torch.Tensor) -> torch.Tensor:
    """A causal toy whose loss depends on the whole prefix: -log softmax of a logit table picked by the prefix's sum."""
    table = torch.randn(97, VOCAB, generator=torch.Generator().manual_seed(5))
    states = (tokens_BS * 7 + 3).cumsum(1) % 97
    logits = table[states[:, :-1]]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens_BS[:, 1:], reduction="none")


def context_nll(tokens_BS: torch.Tensor) -> torch.Tensor:
    """Loss = number of tokens before the predicted one: makes context lengths visible."""
    return torch.arange(1, tokens_BS.shape[1], dtype=torch.float32).expand(tokens_BS.shape[0], -1)


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    result = whole_windows(lambda t: torch.full((1, t.shape[1] - 1), math.log(VOCAB)), text(60).view(3, 20))
    assert result.perplexity == pytest.approx(VOCAB, rel=1e-6)
    assert result.nll_stderr == pytest.approx(0.0, abs=1e-12)
    assert (result.windows, result.tokens, result.length) == (3, 57, 20)


def test_whole_windows_equal_a_plain_mean() -> None:
    tokens = text(5 * 33).view(5, 33)
    losses = prefix_nll(tokens).double()
    result = whole_windows(prefix_nll, tokens, block=8)
    assert result.nll == pytest.approx(losses.mean().item(), rel=1e-12)
    means = losses.mean(1)
    assert result.nll_stderr == pytest.approx(means.std().item() / math.sqrt(5), rel=1e-12)
    for index in range(5):  # block b holds window positions 8b .. 8b+7; position 0 is never scored
        expected = losses[:, max(8 * index - 1, 0) : 8 * index + 7].mean().item()
        assert result.block_nll[index] == pytest.approx(expected, rel=1e-12)
    assert result.block_tokens == (35, 40, 40, 40, 5)
    assert sum(result.block_tokens) == result.tokens == 160


def test_windows_go_through_the_model_one_at_a_time() -> None:
    shapes = []
    done = []

    def nll(tokens: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return context_nll(tokens)

    whole_windows(nll, text(40).view(4, 10), on_window=lambda: done.append(1))
    assert shapes == [(1, 10)] * 4 and len(done) == 4


@given(tokens=st.integers(2, 120), length=st.integers(2, 40), data=st.data())
def test_sliding_scores_each_token_once_with_the_promised_context(
    tokens: int, length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length))
    spans = sliding_spans(tokens, length, stride)
    scored = [token for _, end, first in spans for token in range(first, end)]
    skipped = set(range(0, tokens, length)) if stride == length else {0}
    assert scored == [token for token in range(tokens) if token not in skipped]
    for index, (begin, end, first) in enumerate(spans):
        assert end - begin <= length and begin == index * stride
        assert first - begin >= (1 if index == 0 else max(length - stride, 1))
        assert end - begin == length or end == tokens


@given(tokens=st.integers(2, 90), length=st.integers(2, 30), data=st.data())
def test_sliding_equals_the_hugging_face_loop(tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    stream = text(tokens, seed=tokens)
    total, count, previous = 0.0, 0, 0
    for begin in range(0, tokens, stride):  # the loop of the guide, with its labels shifted inside the model
        end = min(begin + length, tokens)
        labels = torch.full((end - begin,), -100)
        labels[previous - begin :] = stream[previous:end]
        losses = prefix_nll(stream[begin:end].unsqueeze(0))[0].double()
        valid = labels[1:] != -100
        total, count, previous = total + losses[valid].sum().item(), count + int(valid.sum()), end
        if end == tokens:
            break
    result = sliding_window(prefix_nll, stream, length, stride)
    assert result.tokens == count
    assert result.nll == pytest.approx(total / count, rel=1e-9)


def test_sliding_gives_the_last_tokens_more_context_than_whole_windows_do() -> None:
    result = sliding_window(context_nll, text(100), length=20, stride=5, block=5)
    # first window: contexts 1..19; then 16 windows of 5 tokens with contexts 15..19
    assert result.windows == 17 and result.tokens == 99
    assert result.nll == pytest.approx((sum(range(1, 20)) + 16 * sum(range(15, 20))) / 99)
    assert result.block_tokens == (4, 5, 5, 85)
    assert result.block_nll[3] == pytest.approx(17.0)


def test_stride_equal_to_length_is_whole_windows() -> None:
    stream = text(60)
    sliding = sliding_window(prefix_nll, stream, length=20, stride=20)
    assert sliding == whole_windows(prefix_nll, stream.view(3, 20))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("stride", [None, 7])
def test_ranks_together_equal_one_process_bit_for_bit(world: int, stride: int | None) -> None:
    stream = text(400)

    def run(shards: Shards) -> EvalReport:
        return evaluate(prefix_nll, stream, [16, 40], 5, stride, label="x", step=0, shards=shards)

    alone = run(Shards())
    tables: list[list[torch.Tensor]] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        tables[-1].append(tensor.clone())
        return tensor + 1  # this pass only collects; keeps counts positive

    for rank in range(world):
        tables.append([])
        run(Shards(rank, world, record))
    for rank in range(world):
        sums = iter([torch.stack(parts).sum(0) for parts in zip(*tables, strict=True)])
        assert run(Shards(rank, world, lambda _, sums=sums: next(sums))).lengths == alone.lengths  # type: ignore[misc]


@given(windows=st.integers(0, 50), world=st.integers(1, 9))
def test_shards_partition_the_windows_evenly(windows: int, world: int) -> None:
    parts = [list(shard(windows, rank, world)) for rank in range(world)]
    assert sorted(sum(parts, [])) == list(range(windows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(tokens=st.integers(1, 300), length=st.integers(2, 60), count=st.integers(1, 8))
def test_windows_are_spread_and_never_overlap(tokens: int, length: int, count: int) -> None:
    stream = torch.arange(tokens)
    if tokens < length:
        with pytest.raises(DataError, match=f"{tokens} tokens.*{length}.*eval"):
            cut_windows(stream, length, count)
        return
    windows = cut_windows(stream, length, count)
    assert windows.shape == (min(count, tokens // length), length)
    flat = windows.flatten().tolist()
    assert flat == sorted(set(flat))
    starts = windows[:, 0]
    gaps = (starts[1:] - starts[:-1] - length).unique().tolist()
    assert len(gaps) <= 1
    assert tokens - (int(starts[-1]) + length) < (gaps[0] if gaps else tokens) + len(windows)


def test_lengths_share_their_blocks_and_the_report_survives_json(tmp_path: Path) -> None:
    report = evaluate(prefix_nll, text(500), [64, 32, 32], 3, None, label="after", step=20)
    assert list(report.perplexity) == [32, 64]
    assert [result.block for result in report.lengths] == [4, 4]
    assert [len(result.block_nll) for result in report.lengths] == [8, 16]
    path = tmp_path / "run" / "eval-after.json"
    report.write(path)
    assert EvalReport.read(path) == report
    data = json.loads(path.read_text())
    assert data["lengths"][1]["perplexity"] == pytest.approx(report.perplexity[64])


def test_a_strided_evaluation_has_the_asked_number_of_windows() -> None:
    report = evaluate(prefix_nll, text(500), [32, 64], 6, 8, label="x", step=0)
    assert [result.windows for result in report.lengths] == [6, 6]
    assert [result.tokens for result in report.lengths] == [31 + 5 * 8, 63 + 5 * 8]


def test_a_broken_model_shows_as_infinite_not_as_a_crash(tmp_path: Path) -> None:
    awful = whole_windows(lambda t: torch.full((1, t.shape[1] - 1), 1e4), text(10).view(1, 10))
    assert awful.perplexity == math.inf and awful.nll_stderr is None
    nan = whole_windows(lambda t: torch.full((1, t.shape[1] - 1), math.nan), text(10).view(1, 10))
    assert math.isnan(nan.perplexity)
    path = tmp_path / "eval.json"
    EvalReport("x", 0, None, (awful, nan), 1.0).write(path)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert math.isnan(EvalReport.read(path).lengths[1].perplexity)


def test_fp64_sums_do_not_lose_small_terms() -> None:
    losses = torch.full((1, 2**16), 1e-3)
    losses[0, 0] = 2.0**24
    result = whole_windows(lambda t: losses, torch.zeros(1, 2**16 + 1, dtype=torch.int64), block=2**17)
    assert result.nll * 2**16 - 2.0**24 == pytest.approx((2**16 - 1) * float(losses[0, 1]), rel=1e-6)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nll returned"):
        whole_windows(lambda t: torch.zeros(1, t.shape[1]), text(10).view(1, 10))
    with pytest.raises(ValueError, match="stride 11"):
        sliding_spans(50, 10, 11)
    with pytest.raises(DataError, match="1 tokens"):
        sliding_window(prefix_nll, text(1), 10, 5)
    with pytest.raises(ValueError, match="rank 2"):
        shard(4, 2, 2)
    with pytest.raises(DataError, match="cannot be read"):
        EvalReport.read(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"label": "x", "lengths": [{"length": 3}]}')
    with pytest.raises(DataError, match="bad.json.*windows"):
        EvalReport.read(tmp_path / "bad.json")


def test_block_perplexity_skips_empty_blocks() -> None:
    result = LengthResult(4, 1, 2, 1.0, None, 2, (None, 1.0), (0, 2))
    assert list(result.block_perplexity) == [None, math.exp(1.0)]


@pytest.mark.parametrize("stride", [None, 5, 16])
def test_bits_a_byte_are_the_nats_of_the_text_over_its_bytes(stride: int | None) -> None:
    """By hand: token t of this toy tokenizer is t + 1 letters long."""
    stream = text(100)

    def bytes_of(ids: Sequence[int]) -> int:
        return sum(token + 1 for token in ids)

    report = evaluate(prefix_nll, stream, [16], 3, stride, label="x", step=0, bytes_of=bytes_of)
    (result,) = report.lengths
    if stride is None:
        scored = cut_windows(stream, 16, 3)[:, 1:].flatten().tolist()
    else:
        covered = stream[: 16 + 2 * stride].tolist()
        scored = [covered[i] for _, end, first in sliding_spans(len(covered), 16, stride) for i in range(first, end)]
    assert len(scored) == result.tokens and result.bytes == bytes_of(scored)
    assert result.bits_per_byte == pytest.approx(result.nll * len(scored) / math.log(2) / bytes_of(scored))
    assert report.to_json()["lengths"][0]["bits_per_byte"] == result.bits_per_byte
