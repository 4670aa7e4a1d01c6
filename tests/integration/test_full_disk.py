"""tools.prepare_data on a full disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from pipeline.data import shard_writer
from tests.support.tiny_models import write_tokenizer
from tools import prepare_data


def test_a_full_disk_leaves_nothing_and_names_the_folder_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = tmp_path / "model"
    model.mkdir()
    write_tokenizer(model)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"a{n}"}) + "\n" for n in range(40)))
    words = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer", str(model), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(shard_writer, "sha256_of", full)
    for more, told in (([], "out"), (["--held-out", "0.5"], "out/train")):
        assert prepare_data.main([*words, *more]) == 2
        said = capsys.readouterr().err
        mend = "cannot be written (No space left on device); choose another folder, or make room."
        assert f"error: {tmp_path / told}: {mend}" in said
        assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix != ".lock"]
        assert not list(tmp_path.glob(".*writing*"))
