"""Mixtures: nothing lost or seen twice within an epoch, exact shares, one order for every split of ranks."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import ConfigError, DataError
from pipeline.config.sections import DataConfig
from pipeline.config.sources import SourceConfig
from pipeline.config.yaml_file import dump_config, load_config
from pipeline.data.card import mixture_lines, mixture_page
from pipeline.data.chat import ChatTemplate
from pipeline.data.loader import TrainLoader
from pipeline.data.mixed import MixedWindows, open_windows, shares_of, turn, weights_of
from pipeline.data.packing import OneStore, Window
from pipeline.data.prepare import prepare
from pipeline.data.prepare_chat import prepare_chat
from pipeline.data.sampler import epoch_permutation, rank_indices
from pipeline.data.shards import open_shards
from pipeline.data.tokenizer import load_tokenizer
from tests.support.data_helpers import make_shards
from tests.support.tiny_models import write_tokenizer

weights = st.lists(st.integers(1, 10**12), min_size=1, max_size=7)


class Numbered(OneStore):
    """Windows without tokens."""

    sequence = 4

    def __init__(self, windows: int) -> None:
        self._windows = windows

    @property
    def fingerprint(self) -> str:
        return str(self._windows)

    def window(self, index: int, mask_documents: bool = False) -> Window:
        raise NotImplementedError


def mixed(sizes: list[int], shares: list[int]) -> MixedWindows:
    return MixedWindows([Numbered(size) for size in sizes], [Fraction(share) for share in shares])


def bound(sources: int) -> Fraction:
    return (1 + sum(Fraction(1, number) for number in range(1, sources))) / 2


@given(chosen=weights, start=st.integers(0, 10**15))
def test_turns_count_up_and_keep_to_the_shares(chosen: list[int], start: int) -> None:
    chosen = sorted(chosen, reverse=True)
    whole = sum(chosen)
    counts: dict[int, int] = {}
    for place in range(start, start + 60):
        source, before = turn(place, chosen)
        # One after the other: no turn of a source is left out, and none comes twice.
        assert before == counts.get(source, before)
        counts[source] = before + 1
        assert abs(before - Fraction(place * chosen[source], whole)) < bound(len(chosen))


@given(
    chosen=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=5),
    seed=st.integers(-(2**70), 2**70),
)
def test_every_epoch_of_every_source_is_whole(chosen: list[tuple[int, int]], seed: int) -> None:
    sizes, shares = [size for size, _ in chosen], [share for _, share in chosen]
    data = mixed(sizes, shares)
    ends = np.cumsum(sizes).tolist()
    length = 3 * max(size * sum(shares) // share + 1 for size, share in chosen)
    read = data.order(seed, 0, length).tolist()
    for number, size in enumerate(sizes):
        own = [index for index in read if ends[number] - size <= index < ends[number]]
        assert abs(len(own) - Fraction(length * shares[number], sum(shares))) < bound(len(sizes)), "its share"
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size]) == list(range(ends[number] - size, ends[number]))


@given(
    seed=st.integers(0, 2**40),
    first=st.integers(0, 10**9),
    steps=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4),
)
def test_any_split_over_ranks_gives_one_sequence(seed: int, first: int, steps: list[tuple[int, int, int]]) -> None:
    """Steps of other batches on other grids, as a run that resumes elsewhere takes them."""
    data = mixed([50, 7, 300], [5, 2, 3])
    read, at = [], first
    for world, micro, rounds in steps:
        batch = data.order(seed, at, world * micro * rounds)
        read += [
            index
            for rank in range(world)
            for part in rank_indices(batch, rank, world, micro)
            for index in part.tolist()
        ]
        at += len(batch)
    assert read == mixed([50, 7, 300], [5, 2, 3]).order(seed, first, at - first).tolist()


def test_the_order_is_the_documented_one_on_every_machine() -> None:
    # Recorded: a resumed run must see this order with any later release.
    assert mixed([4, 3], [2, 1]).order(1, 0, 12).tolist() == [2, 5, 0, 1, 6, 3, 1, 4, 3, 0, 4, 2]
    words = [np.random.Philox(np.random.SeedSequence(seeds)).random_raw(3).tolist() for seeds in ([1, 0, 1], [1, 1, 1])]
    second = [4 + index for epoch in words for index in sorted(range(3), key=epoch.__getitem__)]
    first = epoch_permutation(1, 0, 4).tolist() + epoch_permutation(1, 1, 4).tolist()
    # Where 2 p / 3, rounded, steps up it is the first source's turn.
    expected = [first[0], second[0], first[1], first[2], second[1], first[3], first[4], second[2], first[5]]
    assert mixed([4, 3], [2, 1]).order(1, 0, 9).tolist() == expected
    assert [turn(place, [3, 2, 1])[0] for place in range(6)] == [0, 1, 0, 2, 0, 1]


def test_a_single_source_has_the_order_of_a_plain_path() -> None:
    alone = Numbered(9)
    assert mixed([9], [3]).order(5, 7, 30).tolist() == alone.order(5, 7, 30).tolist()
    two = mixed([9, 9], [1, 1])
    orders = [[index % 9 for index in two.order(5, 0, 18).tolist() if index // 9 == part] for part in (0, 1)]
    assert orders[0] != orders[1], "sources of one size are not read in step"


def test_resuming_at_ten_million_takes_no_longer_than_beginning() -> None:
    data = mixed([1_000_000, 250_000, 40_000], [5, 4, 1])
    began = time.process_time()
    data.order(3, 10_000_000, 256)
    assert time.process_time() - began < 2


@dataclass(frozen=True)
class Case:
    """Sources as YAML and a part of what is said."""

    sources: list[dict[str, object]]
    said: str


@pytest.mark.parametrize(
    "case",
    [
        Case([], "data.path: an empty list names nothing"),
        Case([{"path": "a", "weight": 0}, {"path": "b", "weight": 1}], "data.path: a has weight 0; give it more"),
        Case([{"path": "a", "epochs": -1}], "data.path: a has epochs -1; give it more than 0"),
        Case([{"path": "a", "weight": 1, "epochs": 1}], "a has a weight and epochs, which both say how often"),
        Case([{"path": "a", "weight": 1}, {"path": "b", "epochs": 2}], "a has a weight and b has none; give all"),
        Case([{"path": "a"}, {"path": "b"}, {"path": "./a"}], "data.path: ./a is there twice"),
        Case([{"path": "a"}, {"path": "a/b"}], "data.path: a and a/b overlap"),
        Case([{"path": ""}], "data.path: is empty"),
        Case([{"weight": 1}], "data.path[0].path: missing"),
        Case([{"path": "a", "wieght": 1}], "data.path[0].wieght: unknown key"),
        Case([{"path": "a", "weight": "much"}], "data.path[0].weight: expected a finite number"),
    ],
    ids=lambda case: case.said,
)
def test_sources_that_are_refused(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    tree = {"model": {"path": "m", "context": 64}, "train": {"steps": 1}, "output": "o"}
    file.write_text(yaml.safe_dump({**tree, "data": {"path": case.sources}}))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert case.said in str(caught.value) and str(caught.value)[-1] in ".?" and "\n" not in str(caught.value)


def test_a_list_of_sources_is_read_and_recorded(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    tree = {"model": {"path": "m", "context": 64}, "data": {"path": "d"}, "train": {"steps": 1}, "output": "o"}
    file.write_text(yaml.safe_dump(tree))
    plain = load_config(file)
    assert plain.data.path == "d" and plain.data.named_sources == {"data.path": "d"}
    several = load_config(file, ["data.path=[{path: ~/a, weight: 0.7}, {path: b, weight: 2}]"])
    assert several.data.sources == (SourceConfig(str(Path.home() / "a"), 0.7), SourceConfig("b", 2.0))
    assert list(several.data.named_sources) == ["data.path[0]", "data.path[1]"]
    (tmp_path / "again.yaml").write_text(dump_config(several))
    assert load_config(tmp_path / "again.yaml") == several
    assert several.data.holds("b/c") and not several.data.holds("c")
    with pytest.raises(ConfigError, match=r"data\.path: missing in .*; add data\.path \(a path\)\."):
        load_config(file, ["data={}"])


def test_weights_are_exact_and_epochs_go_by_size() -> None:
    def shares(sources: list[SourceConfig], windows: list[int]) -> list[Fraction]:
        found = weights_of(sources, windows)
        return [weight / sum(found) for weight in found]

    thirds = [SourceConfig("a", 0.1), SourceConfig("b", 0.2)]
    assert shares(thirds, [5, 7]) == [Fraction(1, 3), Fraction(2, 3)]
    assert shares([SourceConfig("a"), SourceConfig("b")], [30, 10]) == [Fraction(3, 4), Fraction(1, 4)]
    assert shares([SourceConfig("a"), SourceConfig("b", epochs=3.0)], [30, 10]) == [Fraction(1, 2), Fraction(1, 2)]
    # 40 windows of which the second source's 10 are read three times for once of the first's 30.
    data = MixedWindows(
        [Numbered(30), Numbered(10)], weights_of([SourceConfig("a"), SourceConfig("b", epochs=3)], [30, 10])
    )
    counts = Counter(data.order(0, 0, 60).tolist())
    assert [counts[index] for index in range(40)] == [1] * 30 + [3] * 10


def test_windows_of_several_stores(tmp_path: Path) -> None:
    stores = [
        make_shards(tmp_path / "a", [list(range(10, 50))]),
        make_shards(tmp_path / "b", [list(range(60, 90)), [91]]),
    ]
    sources = [SourceConfig("a", 3.0), SourceConfig("b", 1.0)]
    data = open_windows(sources, stores, 4, mask_documents=True)
    assert isinstance(data, MixedWindows) and len(data) == 10 + 8 and data.stores == tuple(stores)
    read = []
    for rank in range(2):
        with TrainLoader(data, 7, 8, 2, rank, 2, mask_documents=True) as loader:
            loader.begin_at(3, 24)
            read += [row for batch in loader.step(3) for row in batch.tokens.tolist()]
    alone = open_windows(sources, stores, 4, mask_documents=True)
    wanted = [alone.window(index, True).tokens.tolist() for index in alone.order(7, 24, 8).tolist()]
    assert read == wanted and sum(row[0] >= 60 for row in read) == 2, "a quarter from b"
    assert data.window(10, True).tokens.tolist() == [60, 61, 62, 63] and data.window(9).tokens[0] == 46
    # The second source's last window has its two documents, numbered by itself.
    assert data.documents(17) == [0, 1] and data.documents(0) == [0] and data.source_of(17) == 1
    with pytest.raises(IndexError):
        data.window(18)

    others = [[SourceConfig("a", 3.0), SourceConfig("b", 2.0)], [SourceConfig("a"), SourceConfig("b")]]
    prints = {open_windows(each, stores, 4, True).fingerprint for each in (sources, *others)}
    assert (
        len(prints) == 3
        and open_windows([SourceConfig("x", 6.0), SourceConfig("y", 2.0)], stores, 4, True).fingerprint in prints
    )

    with pytest.raises(ConfigError, match=r"data\.path: b holds the very tokens of a; name one"):
        open_windows(sources, [stores[0], stores[0]], 4, True)
    with pytest.raises(DataError, match="a: holds 41 tokens, but one window of 64 needs 65"):
        open_windows(sources, stores, 64, True)
    plain = open_windows([SourceConfig("a")], stores[:1], 4, True)
    assert not isinstance(plain, MixedWindows) and shares_of([SourceConfig("a")], plain) == []

    rows = [{**vars(share), "times_read": 2.0} for share in shares_of(sources, data)]
    assert mixture_lines(rows)[0] == "75.0% from a: 1 document, 41 tokens, 10 windows, each read 2 times"
    assert "| b | 2 documents | 33 | 8 | 25.00% | 2 times |" in mixture_page(rows)


def test_a_file_of_two_sources_is_refused_where_one_is_a_pattern(tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt", "three.csv"):
        (tmp_path / name).write_text("text")
    stores = [make_shards(tmp_path / "a", [list(range(10, 50))]), make_shards(tmp_path / "b", [list(range(60, 90))])]

    def opened(first: str, second: str) -> int:
        return len(open_windows([SourceConfig(f"{tmp_path}/{name}") for name in (first, second)], stores, 4, True))

    assert opened("*.txt", "*.csv") == opened("t[w]*", "one.txt") == 17
    for first, second, both in (
        ("*.txt", "t*", "two.txt"),
        ("*e.txt", "one.txt", "one.txt"),
        (".", "t*.c*", "three.csv"),
    ):
        with pytest.raises(ConfigError, match=rf"overlap, so {tmp_path}/{both} would count twice; change the pattern"):
            opened(first, second)


def test_text_and_conversations(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    (tmp_path / "chat.json").write_text(json.dumps([{"instruction": "q" * n, "output": "a" * n} for n in (3, 7, 5)]))
    prepare_chat(tmp_path / "chat.json", tmp_path / "chat", ChatTemplate(tokenizer, tmp_path / "t.jinja"), None)
    (tmp_path / "text.txt").write_text("x" * 200)
    prepare(tmp_path / "text.txt", tmp_path / "text", tokenizer)
    sources = [SourceConfig("chat", 1.0), SourceConfig("text", 1.0)]
    stores = [open_shards(tmp_path / name) for name in ("chat", "text")]
    data = open_windows(sources, stores, 16, mask_documents=True)
    windows = [data.window(index, True) for index in data.order(0, 0, 10).tolist()]
    conversations = [window for window in windows if (window.labels == -100).sum() > 2]
    assert len(conversations) == 5, "every other window is of conversations, whose questions are not scored"
    assert [share.chat for share in shares_of(sources, data)] == [True, False]
    with pytest.raises(ConfigError, match=r"data\.mask_documents: .*chat holds conversations"):
        open_windows(sources, stores, 16, mask_documents=False)


def test_a_plain_path_stays_plain() -> None:
    assert DataConfig("books").sources == (SourceConfig("books"),)
