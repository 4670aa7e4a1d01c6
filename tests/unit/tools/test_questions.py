"""Questions have one answer, a sentence far above in the passage; answers are judged by comparing strings."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny_models import make_tiny
from tools.answer_questions import main as answer
from tools.make_questions import main as make
from tools.support.questions import FAR, scored

ASKED = re.compile(
    r'Which sentence of the text above begins with "(.+)"\? Answer with the whole sentence, as it stands there\.'
)


@pytest.fixture(scope="module")
def book() -> str:
    """Sentences with marks, quotes, titles and wrapped lines, a refrain that comes again and again, and one endless
    paragraph."""
    rng = random.Random(1)
    words = "whale sea ship’s captain, stood; and the don't harbour when night fell over every lonely water".split()
    paragraphs = []
    for number in range(400):
        sentences = []
        for _ in range(4):
            said = [f"W{rng.randrange(10**6)}", *rng.choices(words, k=rng.randrange(2, 14))]
            sentences.append(" ".join(said) + rng.choice([".", "!", "?", ' "no".', " of Mr. Starbuck."]))
        sentences.insert(2, "And so they sailed away over the water. " * (number % 3 == 0))
        paragraphs.append(" ".join(filter(None, sentences)).replace(" sea ", " sea\n"))
    paragraphs[7] = "Endless " * 2000
    return "\n\n".join(paragraphs)


def test_the_answer_is_the_sentence_that_stands_there_once_and_far_above(book: str, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(book)
    outs = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for out, seed in zip(outs, "112", strict=True):
        arguments = ["--count", "30", "--characters", "1000", "--seed", seed]
        assert make(["--input", str(tmp_path / "book.txt"), "--output", str(out), *arguments]) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes() != outs[2].read_bytes()
    records = [json.loads(line) for line in outs[0].read_text().splitlines()]
    assert len(records) == 30
    seen = set()
    plain = " ".join(book.split())
    for record in records:
        user, assistant = record["messages"]
        passage, _, question = user["content"].rpartition("\n\n")
        begin, answer = ASKED.fullmatch(question), assistant["content"]
        assert begin is not None and (user["role"], assistant["role"]) == ("user", "assistant")
        assert answer.split(" ")[:4] == begin[1].split(" ") and passage.count(begin[1]) == 1
        assert 6 <= len(answer.split(" ")) <= 14 and not answer.endswith("Mr.")
        assert answer[-1] in ".!?" and not set(answer[:-1]) & set('.!?"') and passage.count(answer) == 1
        at = passage.index(answer)
        assert at == 0 or passage[at - 2 : at].strip(" ") in (*".!?", "\n\n"), "a sentence begins there"
        assert at + len(answer) < FAR * len(passage)
        assert passage.replace("\n\n", " ") in plain.replace("Endless " * 2000, "")
        assert 1000 <= len(passage) + 2 < 1700
        seen.add(passage)
    assert len(seen) == 30


def test_several_questions_on_one_passage_are_on_other_sentences(book: str, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(book)
    out, common = tmp_path / "q.jsonl", ["--input", str(tmp_path), "--characters", "2000"]
    assert make([*common, "--output", str(out), "--count", "60", "--each", "3"]) == 0
    asked = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
    answers: dict[str, list[str]] = {}
    for user, assistant in asked:
        answers.setdefault(user["content"].rpartition("\n\n")[0], []).append(assistant["content"])
    assert max(map(len, answers.values())) == 3
    assert all(len(set(found)) == len(found) for found in answers.values())


def test_too_little_text_is_one_sentence(book: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book.txt").write_text(book)
    arguments = ["--input", str(tmp_path), "--output", str(tmp_path / "q.jsonl")]
    assert make([*arguments, "--count", "5000"]) == 2
    assert (
        "and 5000 are wanted; give more text, raise --each, or lower --count or --characters."
        in capsys.readouterr().err
    )
    assert make([*arguments, "--characters", "100"]) == 2
    assert "--characters: 100 leaves no distance to the question" in capsys.readouterr().err
    assert not (tmp_path / "q.jsonl").exists()


def test_only_the_very_words_are_an_exact_match() -> None:
    score = scored(["a b", " a b\n", "It is a b.", "A b", "a"], ["a b"] * 5)
    assert (score.asked, score.exact, score.held) == (5, 2, 3)


def test_answers_are_what_the_model_says_greedily(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Decoded by hand, without a cache; the conversation without its last message is the prompt."""
    folder = make_tiny(tmp_path / "model", "smollm2", tokenizer=True)
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    record = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    (tmp_path / "q.jsonl").write_text((json.dumps(record) + "\n") * 2)
    arguments = ["--model", folder, "--questions", tmp_path / "q.jsonl", "--chat-template", tmp_path / "t.jinja"]
    arguments += ["--tokens", 5, "--first", 1, "--output", tmp_path / "out.json"]
    assert answer([str(argument) for argument in arguments]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("user:hi;assistant:", add_special_tokens=False)["input_ids"]
    ids = list(prompt)
    with torch.inference_mode():
        while len(ids) < len(prompt) + 5 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    told = json.loads((tmp_path / "out.json").read_text())
    said = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert said and told["answers"] == [{"right": "yes", "answered": said}]
    assert "exact match 0 of 1" in capsys.readouterr().out

    # Where config.json alone names the end of texts, transformers' tokenizer has none: that None was taken for an end.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(folder).eos_token_id is None
    assert answer([str(argument) for argument in arguments]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["answers"] == told["answers"]
