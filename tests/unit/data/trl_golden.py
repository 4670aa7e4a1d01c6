"""Write trl_golden.json: the tokens and the labels that TRL's trainer makes of conversations.

Needs trl 1.16.0, which the tests do not; in an environment of its own:

    pip install 'trl==1.16.0' && PYTHONPATH=. python tests/unit/data/trl_golden.py

All is TRL's own preparation of a data set (`SFTTrainer._prepare_dataset`), called without a model: conversations with
`assistant_only_loss` through templates with marks, and prompts with completions, whose masks it finds by comparing
tokens, through those without. Its own templates of Qwen2.5 (published, and with the marks it trains with) stand beside
the five families of tests/support/chat_templates.py. Plain prompts and completions go through tokenizers that put
different things around a text, and completions of several turns through templates with marks.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, processors

from tests.support.chat_templates import MARKED, PUBLISHED
from tests.support.chat_tokenizers import byte_level, pieces, save

GOLDEN = Path(__file__).with_name("trl_golden.json")
TURNS = [
    {"role": "user", "content": "  Where does the whale swim? "},
    {"role": "assistant", "content": "In the sea — naïve 😀"},
    {"role": "user", "content": "And then?\n"},
    {"role": "assistant", "content": " Far from any land. \n\n"},
    {"role": "user", "content": "12,345 [INST]"},
    {"role": "assistant", "content": "<b>1</b>\tcafé"},
]
RECORDS = [
    TURNS[:2],
    TURNS,
    [{"role": "system", "content": "Answer in a word."}, *TURNS[:4]],
]
PAIRS = [
    ("Where does the whale swim?", " In the sea."),
    ("Where does the whale swim? ", "In the sea."),
    ("Where does the wh", "ale swim?"),
    ("", "Call me café."),
    ("naïve 😀\n\n", "\n 12,345 words\n"),
    ("<s>[INST] far? [/INST]", " From any land.</s>"),
    ("Where </s> does", " the </s> whale"),
]
CONFIGS: list[dict[str, Any]] = [{}, {"add_bos_token": True, "add_eos_token": True}]
"""Of tokenizer_config.json, which transformers does not follow where tokenizer.json says what is put around a text."""
TOKENIZERS = {"byte level": byte_level, "pieces": pieces}


def prepared(rows: list[dict[str, Any]], tokenizer: Any, template: str, answers_only: bool) -> list[dict[str, Any]]:
    """Rows as SFTTrainer prepares them before it trains."""
    from datasets import Dataset
    from trl import SFTTrainer

    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=template, completion_only_loss=True)
    arguments = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=answers_only,
        max_length=None,
        shuffle_dataset=False,
    )
    made = SFTTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, arguments, False, None, "train")
    return [{"tokens": row["input_ids"], "scored": [int(label != -100) for label in row["labels"]]} for row in made]


def starting(tokenizer: Tokenizer) -> Tokenizer:
    """The same, with BOS put before a text."""
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def plain_of(tokenizer: Tokenizer, config: dict[str, Any], starts: bool) -> list[dict[str, Any]]:
    """What becomes of `PAIRS`."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as place:
        folder = save(Path(place) / "model", starting(tokenizer) if starts else tokenizer, **config)
        theirs = AutoTokenizer.from_pretrained(folder)
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
        return prepared(rows, theirs, "", False)


def main() -> None:
    """Write the file."""
    import trl
    from transformers import AutoTokenizer

    folder = Path(trl.__file__).parent / "chat_templates"
    own = {name: (folder / f"{name}.jinja").read_text() for name in ("qwen2_5", "qwen2_5_training")}
    golden: dict[str, Any] = {"trl": trl.__version__, "templates": own, "tokenizers": {}, "cases": [], "plain": []}
    for kind, make in TOKENIZERS.items():
        tokenizer = make()
        golden["tokenizers"][kind] = json.loads(tokenizer.to_str())
        with tempfile.TemporaryDirectory() as place:
            theirs = AutoTokenizer.from_pretrained(save(Path(place) / "model", tokenizer))
        marked = {**MARKED, "qwen2_5": own["qwen2_5_training"]}
        plain = {**PUBLISHED, "qwen2_5": own["qwen2_5"]}
        for family in plain:
            # The published template of Mistral takes no system message.
            records = [turns for turns in RECORDS if not (family == "Mistral" and turns[0]["role"] == "system")]
            whole = prepared([{"messages": turns} for turns in records], theirs, marked[family], True)
            last = prepared(
                [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in records], theirs, plain[family], False
            )
            for turns, all_answers, last_answer in zip(records, whole, last, strict=True):
                case = {"tokenizer": kind, "family": family, "messages": turns}
                golden["cases"].append({**case, "all": all_answers, "last": last_answer})
            turns = RECORDS[1]
            (made,) = prepared([{"prompt": turns[:3], "completion": turns[3:]}], theirs, marked[family], True)
            golden["cases"][-1]["several"] = {"messages": turns, **made}
        for config in CONFIGS:
            for starts in (False, True):
                golden["plain"].append(
                    {"tokenizer": kind, "config": config, "starts": starts, "made": plain_of(make(), config, starts)}
                )
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":"), ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{GOLDEN}: {len(golden['cases'])} conversations")


if __name__ == "__main__":
    main()
