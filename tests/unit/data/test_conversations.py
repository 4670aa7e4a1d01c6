"""Records of conversations: what is read of them, and which records and files are refused."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest
import zstandard

from parallel.errors import DataError
from pipeline.data.chat_records import read_records
from tests.support.conversations import LONG, SYSTEM


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            b'{"instruction": "a", "output": "b"}\n{"messages": []}\n',
            "line 2 is of the schema messages, line 1 of Alpaca",
        ),
        (b'{"instruction": "a", "output": "b"}\n{"instruc\n', "line 2 is not JSON"),
        (b'[{"instruction": "a", "output": "b"}, 3]', "record 2 is not a JSON object"),
        (b'[{"instruction": "a", ', "is not JSON"),
        (b'{"question": "a"}\n', "line 1 is no conversation"),
        (b"\xff\xfe\n", "is UTF-16 text, not UTF-8; convert it, e.g. with iconv -f UTF-16 -t UTF-8"),
        (b"\xfe\n", "line 1 is not JSON in UTF-8"),
        (b'\n{\n "instruction": "a",\n "output": "b"\n}\n', "begins with an object over several lines, and JSON is"),
        (b'{"instruction": "a", "out', "line 1 is not JSON in UTF-8 .Unterminated string"),
        (b'{"train": [{"instruction": "a", "output": "b"}]}', "is no conversation but has a list of them in 'train'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
        (gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 99, mtime=0)[:-9], "truncated or corrupt"),
    ],
)
def test_files_that_are_refused(data: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(data)
    with pytest.raises(DataError, match=words) as caught:
        list(read_records(file))
    assert str(file) in str(caught.value)


def test_packed_lists_are_read(tmp_path: Path) -> None:
    for number, pack in enumerate((gzip.compress, lzma.compress, zstandard.compress, bytes)):
        file = tmp_path / f"{number}.json"
        file.write_bytes(pack(json.dumps([LONG, SYSTEM], indent=1).encode()))
        assert [record.value for record in read_records(file)] == [LONG, SYSTEM]
