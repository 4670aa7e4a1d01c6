"""The loss on held-out conversations is that of transformers, one conversation at a time, on every grid and engine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from parallel.world.rank_env import RankEnv
from pipeline.config.yaml_file import load_config
from pipeline.data.chat import ChatTemplate
from pipeline.data.prepare_chat import prepare_chat
from pipeline.data.samples import SampleDataset
from pipeline.data.shards import open_shards
from pipeline.data.tokenizer import load_tokenizer
from pipeline.evaluation.answers import AnswersReport, answers_path
from pipeline.evaluation.entry import evaluate_state
from tests.support.chat_templates import PUBLISHED
from tests.support.ranks import run_ranks
from tests.support.tiny_models import make_tiny, write_tokenizer

CONVERSATIONS = 23
YAML = """
model: {{path: {0}/base, context: 128, dtype: fp32, rope: {{type: linear, factor: 2}}}}
attention: {{kind: s2, group_size: 16}}
data: {{path: {0}/data, sequence: 90, mask_documents: true}}
train: {{steps: 6, global_batch: 4}}
eval: {{path: {0}/data}}
output: {0}/{1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and prepared conversations, some with two answers, which differ much in length."""
    root = tmp_path_factory.mktemp("answers")
    make_tiny(root / "base", "llama2", num_key_value_heads=2, vocab_size=131)
    write_tokenizer(root / "base")
    (root / "t.jinja").write_text(PUBLISHED["Llama-2"])
    rng = np.random.default_rng(0)
    rows = []
    for number in range(CONVERSATIONS):
        turns = []
        for _ in range(1 + number % 2):
            turns.append({"role": "user", "content": "q" * int(rng.integers(1, 24))})
            turns.append({"role": "assistant", "content": f"{number}" * int(rng.integers(1, 12)) + "."})
        rows.append({"messages": turns})
    (root / "rows.json").write_text(json.dumps(rows))
    prepare_chat(root / "rows.json", root / "data", ChatTemplate(load_tokenizer(root / "base"), root / "t.jinja"), None)
    return root


@pytest.fixture(scope="module")
def theirs(folder: Path) -> list[tuple[int, float, int]]:
    """Of each conversation, alone, in fp64: scored tokens, the sum of their losses, how many are the arg max."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64).eval()
    model.model.rotary_emb.inv_freq /= 2  # linear interpolation by 2, as the run's
    shards = open_shards(folder / "data")
    assert shards.scored is not None
    ends = [*shards.starts[1:].tolist(), len(shards)]
    found = []
    for start, end in zip(shards.starts.tolist(), ends, strict=True):
        ids = torch.from_numpy(shards.read(start, end))
        wanted = torch.from_numpy(shards.scored[start + 1 : end] != 0)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1][wanted]
        target = ids[1:][wanted]
        losses = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        found.append((int(wanted.sum()), float(losses), int((logits.argmax(-1) == target).sum())))
    return found


def _settings(folder: Path, grid: str, *more: str) -> tuple[str, list[str]]:
    name = "".join(filter(str.isalnum, "".join((grid, *more))))
    path = folder / f"{name}.yaml"
    path.write_text(YAML.format(folder, name))
    return str(path), [f"parallel.{grid}"] * (grid not in ("one", "dp=2")) + list(more)


def _evaluate(rank: int, world: int, path: str, overrides: list[str]) -> None:
    evaluate_state(load_config(Path(path), overrides), RankEnv.read(), "untrained")


def check(report: AnswersReport, theirs: list[tuple[int, float, int]]) -> None:
    assert list(report.tokens) == [count for count, _, _ in theirs]
    np.testing.assert_allclose(report.conversation_nll, [total / count for count, total, _ in theirs], rtol=2e-5)
    assert list(report.right) == [right for _, _, right in theirs]
    loss = sum(total for _, total, _ in theirs) / sum(count for count, _, _ in theirs)
    assert report.nll == pytest.approx(loss, rel=1e-5) and report.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_one_process_equals_transformers(folder: Path, theirs: list[tuple[int, float, int]]) -> None:
    path, overrides = _settings(folder, "one")
    shards = open_shards(folder / "data")
    lengths = np.diff(np.append(shards.starts, len(shards)))
    data = SampleDataset(shards, int(lengths.max()))
    assert max(len(data.documents(index)) for index in range(len(data))) > 1, "a window holds several"
    evaluate_state(load_config(Path(path), overrides), RankEnv(), "untrained")
    report = _read(folder, "one")
    check(report, theirs)
    assert report.length == lengths.max() and report.step == 0

    # In chunks of 16 tokens, the keys of the earlier ones waiting in host memory.
    path, overrides = _settings(folder, "one", "eval.prefill=16")
    evaluate_state(load_config(Path(path), overrides), RankEnv(), "untrained")
    check(_read(folder, "one", "eval.prefill=16"), theirs)

    # The first five alone, in another packing.
    path, overrides = _settings(folder, "one", "eval.conversations=5")
    evaluate_state(load_config(Path(path), overrides), RankEnv(), "untrained")
    check(_read(folder, "one", "eval.conversations=5"), theirs[:5])


def _read(folder: Path, grid: str, *more: str) -> AnswersReport:
    name = "".join(filter(str.isalnum, "".join((grid, *more))))
    return AnswersReport.read(answers_path(folder / name, "untrained"))


@pytest.mark.parametrize(
    ("world", "grid"),
    [
        (2, ("tp=2",)),
        (2, ("cp=2",)),
        (2, ("pp=2",)),
        (2, ("dp=2",)),
        (2, ("engine=zero3",)),
        (4, ("tp=2", "parallel.cp=2")),
        (2, ("cp=2", "eval.prefill=16")),
    ],
    ids=str,
)
def test_every_grid_equals_transformers(
    world: int, grid: tuple[str, ...], folder: Path, theirs: list[tuple[int, float, int]]
) -> None:
    run_ranks(_evaluate, world, *_settings(folder, *grid), timeout=300)
    check(_read(folder, *grid), theirs)
