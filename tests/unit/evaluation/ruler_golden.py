"""Write ruler_golden.json: what lm-evaluation-harness asks and how it scores.

Needs lm_eval[ruler] 0.4.13, which the tests do not; in an environment of its own:

    pip install 'lm_eval[ruler]==0.4.13' && python tests/unit/evaluation/ruler_golden.py

Replaced in the harness: the tokenizer (words and signs are tokens), the essays (a download; here the text below), and
nltk's trained sentence cutter (a download; here the rule of `needles.sentences_of`). All else is its own, from its task
files to the request that a model would be sent, with its seeds 0 and 1234, one task and length a process.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import random
import re
import sys
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("ruler_golden.json")
WANTED = 3
"""Prompts of each task and length."""
CASES = {
    "niah_single_1": (600, 4500),
    "niah_single_2": (900, 4500),
    "niah_single_3": (900,),
    "niah_multikey_1": (900,),
    "niah_multikey_2": (600, 4500),
    "niah_multikey_3": (900,),
    "niah_multivalue": (900,),
    "niah_multiquery": (900,),
    "ruler_vt": (900, 2000),
    "ruler_cwe": (900, 4500),
    "ruler_fwe": (900, 4500),
}
SCORED = [
    ("The number is 1234567.", ["1234567"]),
    (" 12345678\n", ["1234567"]),
    ("first ABC,\x00 then abD", ["abc", "ABD", "xyz"]),
    ("", ["a"]),
    ("blue-eyed-Whale", ["blue-eyed-whale", "whale", "ale\n"]),
]


def tokens_of(text: str) -> list[str]:
    """A token each word and each sign."""
    return re.findall(r"\w+|[^\w\s]", text)


def essay() -> str:
    """Sentences of some words, no two paragraphs alike."""
    rng, words = random.Random(5), "sea whale ship calm deck sail mate wind wave rope mast storm".split()
    said = [" ".join(rng.choices(words, k=rng.randint(3, 12))).capitalize() + rng.choice(".!?") for _ in range(1200)]
    return "".join(sentence + ("\n\n" if n % 7 == 6 else " ") for n, sentence in enumerate(said)).strip()


def _asked(case: tuple[str, int]) -> list[dict[str, Any]]:
    import numpy as np
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    class Words:
        def __call__(self, text: str) -> Any:
            return type("Ids", (), {"input_ids": tokens_of(text)})

    AutoTokenizer.from_pretrained = lambda *given, **named: Words()
    import datasets

    datasets.load_dataset = lambda *given, **named: {"text": [essay()]}
    name, length = case
    random.seed(0)
    np.random.seed(1234)
    manager = TaskManager(metadata={"tokenizer": "words", "max_seq_lengths": [length]})
    task = manager.load([name])["tasks"][name]
    task.build_all_requests(limit=WANTED)
    found = []
    for request in task.instances:
        prompt, settings = request.args
        found.append({"prompt": prompt, "answers": request.doc["outputs"], "new": settings["max_gen_toks"]})
        assert settings["until"] == [] and not settings["do_sample"]
    return found


def _scores(_: None) -> list[float]:
    from lm_eval.tasks.ruler.common_utils import process_results

    docs = [{"outputs": answers, "max_length": 4096} for _, answers in SCORED]
    return [process_results(doc, [said])["4096"] for doc, (said, _) in zip(docs, SCORED, strict=True)]


def main() -> None:
    """Write the file."""
    import nltk

    nltk.data.find = lambda name: name
    nltk.sent_tokenize = lambda text: re.split(r"(?<=[.!?])\s+", text.strip())
    golden: dict[str, Any] = {"cases": [], "whole": {}}
    # Imported once; the random states are those of a new process in each child.
    for module in ("lm_eval.tasks", "transformers", "datasets", "lm_eval.tasks.ruler.prepare_niah"):
        importlib.import_module(module)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for name, lengths in CASES.items():
            for length in lengths:
                found = pool.apply(_asked, ((name, length),))
                for entry in found:
                    prompt = entry.pop("prompt")
                    entry["sha256"] = hashlib.sha256(prompt.encode()).hexdigest()
                    golden["whole"].setdefault(name, prompt)
                golden["cases"].append({"task": name, "length": length, "samples": found})
                print(name, length, len(found), file=sys.stderr)
        golden["scores"] = pool.apply(_scores, (None,))
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
