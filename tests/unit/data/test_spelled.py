"""Documents that spell special tokens are counted once each, however they come in parts; plain ones are not."""

from __future__ import annotations

import json
import random
from pathlib import Path

from pipeline.data.card import read_card
from pipeline.data.prepare import prepare
from pipeline.data.spelled import Spelled, special_contents
from pipeline.data.tokenizer import load_tokenizer
from tests.support.tiny_models import write_tokenizer

CONTENTS = ["<s>", "</s>", "<|end|>", "<|reserved_1|>", "<|reserved_22|>", "[INST]"]


def test_documents_are_counted_as_by_looking_for_each_token() -> None:
    rng = random.Random(0)
    pieces = [*CONTENTS, "<", "<|", "s>", "<|reserved_", "</", "[", "words", " ", "|>"]
    spelled, wanted, first = Spelled(CONTENTS), 0, None
    for number in range(300):
        parts = ["".join(rng.choices(pieces[len(CONTENTS) :] if rng.random() < 0.6 else pieces, k=3)) for _ in range(3)]
        for place, part in enumerate(parts):
            spelled.add(part, place == 2, Path(str(number)))
        held = [content for part in parts for content in CONTENTS if content in part]
        wanted += bool(held)
        first = first or (Path(str(number)) if held else None)
    assert 50 < spelled.documents == wanted < 250
    assert spelled.first is not None and spelled.first[1] == first and spelled.first[0] in CONTENTS


def test_prepared_text_tells_of_them_and_keeps_their_characters(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    assert special_contents(tokenizer) == ["<unk>", "<s>", "</s>"]
    (tmp_path / "in").mkdir()
    for name, texts in {"a": ["plain", "a < b"], "b": ["x</s>y", "fine", "<s>z</s>"]}.items():
        (tmp_path / f"in/{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    manifest = prepare(tmp_path / "in", tmp_path / "out", tokenizer)
    assert manifest.tokens == sum(len(text) + 1 for text in ("plain", "a < b", "x</s>y", "fine", "<s>z</s>"))
    card = read_card(tmp_path / "out")
    assert card is not None and card["warnings"] == [
        "2 documents spell a special token, which stays the characters it is (first: '</s>' in "
        f"{tmp_path / 'in/b.jsonl'})."
    ]
