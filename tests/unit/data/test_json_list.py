"""Objects of a JSON list, read a few at a time, are those that json reads at once."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import DataError
from pipeline.data import json_list
from pipeline.data.json_list import read_objects

FILE = Path("list.json")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
objects = st.lists(st.dictionaries(st.text(max_size=4), values, max_size=4), max_size=6)


def read(data: bytes) -> list[dict[str, Any]]:
    found = list(read_objects(io.BytesIO(data), FILE))
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    return [value for _, value in found]


@given(listed=objects, indent=st.sampled_from([None, 1]), escaped=st.booleans(), chunk=st.integers(1, 20))
def test_as_json_reads_them(listed: list[dict[str, Any]], indent: int | None, escaped: bool, chunk: int) -> None:
    data = json.dumps(listed, indent=indent, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "_CHUNK", chunk)
        assert read(data) == listed
        assert read(b"\xef\xbb\xbf \n" + data + b"\n ") == listed


@given(listed=objects, place=st.floats(0, 1), chunk=st.sampled_from([3, 1 << 18]))
def test_what_is_cut_off_is_refused(listed: list[dict[str, Any]], place: float, chunk: int) -> None:
    data = json.dumps(listed).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "_CHUNK", chunk)
        with pytest.raises(DataError, match=r"^list\.json: "):
            read(data[: int(place * (len(data) - 1))])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a": 1}', "list.json: is not JSON (it begins with no list)"),
        (b'[{"a": 1}, 3]', "list.json: record 2 is not a JSON object"),
        (b'[{"a": 1} {"b": 2}]', "list.json: record 1 is followed by '{', not by a comma"),
        (b'[{"a": 1}', "list.json: record 1 is followed by '', not by a comma"),
        (b'[{"a": 1},]', "list.json: record 2 is not JSON (Expecting value)"),
        (b'[{"a": 1}] x', "list.json: is not JSON (something follows the list's end)"),
        (b'[{"a": "\xff"}]', "list.json: is not JSON in UTF-8 (invalid start byte)"),
        (b'[{"a": ' + b"[" * 100_000, "list.json: record 1 is not JSON ("),
    ],
)
def test_lists_that_are_none(data: bytes, said: str) -> None:
    with pytest.raises(DataError) as caught:
        read(data)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_long_list_takes_little_memory() -> None:
    data = json.dumps([{"text": "x" * 10_000}] * 3000).encode()  # 30 MB
    stream = io.BytesIO(data)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_objects(stream, FILE)) == 3000
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
