"""Data cards say what a prepared folder holds: counted again, and what was left out with reasons."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.card import CARD, PAGE, Notes, card_of, page_of, read_card
from pipeline.data.shards import open_shards
from tests.support.tiny_models import write_tokenizer
from tools.prepare_data import main
from tools.support.card_plot import LENGTHS, plot_lengths

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + m.content + ';' }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def prepared(tmp_path: Path, model: Path, *more: str) -> Path:
    out = tmp_path / "out"
    assert main(["--input", str(tmp_path / "in"), "--output", str(out), "--tokenizer", str(model), *more]) == 0
    return out


def test_a_card_of_text(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["x" * length for length in (3, 1, 1, 500, 40, 7)] + ["", " \n"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = prepared(tmp_path, model)
    card = json.loads((out / CARD).read_text())
    lengths = sorted(len(text) + 1 for text in texts if text.strip())  # a token a letter, and EOS
    assert (card["documents"], card["tokens"], card["kind"]) == (6, sum(lengths), "text")
    assert card["left_out"] == {"it is empty": {"count": 2}} and "scored_tokens" not in card
    assert card["sources"] == {"files": 1, "bytes": (tmp_path / "in/a.jsonl").stat().st_size}
    assert (card["lengths"]["0%"], card["lengths"]["50%"], card["lengths"]["100%"]) == (2, lengths[2], 501)
    page = (out / PAGE).read_text()
    assert "6 documents, 558 tokens, out of 1 file of" in page and "| it is empty | 2 |" in page
    assert "A document begins without a token of its own and ends with token 2." in page
    told = capsys.readouterr().out
    assert f"median {lengths[2]}, 90% 501, longest 501, mean 93.0; see {out / PAGE}" in told
    with Image.open(out / LENGTHS) as picture:
        assert picture.size[0] > 300
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    prepared(tmp_path, model)  # up to date: the same words, nothing written
    assert "median 4" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    (out / CARD).write_text("{")
    prepared(tmp_path, model)
    assert read_card(out) is None and "median" not in capsys.readouterr().out


def test_a_card_of_conversations(tmp_path: Path, model: Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    (tmp_path / "in").mkdir()
    records = [
        {"instruction": "ab", "output": "cde"},
        {"instruction": "a|b" * 100, "output": "x</s>"},
        {"instruction": "no answer", "output": ""},
        {"instruction": "", "output": "no question"},
    ]
    (tmp_path / "in/a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    out = prepared(tmp_path, model, "--chat", "--chat-template", str(tmp_path / "t.jinja"))
    card = read_card(out)
    assert card is not None
    shards = open_shards(out)
    assert shards.scored is not None
    # "uab;acde;" and the like; scored: the answer and its ";". </s> is one token.
    assert card["lengths"]["0%"] == 9 and card["lengths"]["100%"] == 1 + 300 + 1 + 1 + 2 + 1
    assert card["scored_tokens"] == 4 + 3 == int(np.sum(shards.scored))
    where = tmp_path / "in/a.jsonl"
    assert card["left_out"] == {
        "an answer is empty": {"count": 1, "first": f"{where}: line 3"},
        "a user message is empty": {"count": 1, "first": f"{where}: line 4"},
    }
    # A ";" ends answers there, which is no special token.
    assert ["spells a special token" in one for one in card["warnings"]] == [True, False]
    assert "2 conversations have no answer that ends with a special token which the loss counts" in card["warnings"][1]


def test_quantiles_are_lengths_that_are_there_and_cells_stay_cells() -> None:
    lengths = np.random.default_rng(0).integers(1, 10_000, 999)
    card = card_of(lengths, (None, 0), [5, 6], Notes({"a | b\nc": 3, "never": 0}))
    for share, length in card["lengths"].items():
        place = max(1, int(np.ceil(float(share[:-1]) / 100 * 999)))
        assert length == np.sort(lengths)[place - 1], share
    assert list(card["left_out"]) == ["a | b\nc"] and "| a \\| b c | 3 |" in page_of(card)


def test_no_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_lengths(tmp_path, np.array([1, 2]), "documents") is None and not list(tmp_path.iterdir())
