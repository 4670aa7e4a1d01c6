"""Packed conversations: the loss is transformers', of each conversation alone, and every grid trains alike."""

from __future__ import annotations

import json
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
from pipeline.data.sampler import step_indices
from pipeline.data.samples import SampleDataset
from pipeline.data.shards import open_shards
from pipeline.data.tokenizer import load_tokenizer
from tests.support.chat_templates import PUBLISHED
from tests.support.ranks import run_ranks
from tests.support.tiny_models import make_tiny, write_tokenizer
from tools.support.parity import Observed, compare, observe

SEQUENCE, BATCH, STEPS = 90, 4, 2
YAML = """
model: {{path: {base}, context: 128, dtype: fp32, rope: {{type: linear, factor: 2}}}}
attention: {attention}
lora: {{rank: 4}}
data: {{path: {data}, sequence: 90, mask_documents: true}}
train: {{steps: 6, global_batch: 4, micro_batch: 1, lr: 1.0e-3, eps: 1.0e-4, warmup_steps: 2}}
parallel: {{{grid}}}
output: {output}
"""
S2, FULL = "{kind: s2, group_size: 16}", "{kind: full}"
# What a grid of two ranks leaves is data parallel.
GRIDS = ("tp: 1", "tp: 2", "cp: 2", "pp: 2", "engine: zero3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and prepared conversations whose answers differ much in length."""
    root = tmp_path_factory.mktemp("chat")
    over = {"num_hidden_layers": 2, "num_key_value_heads": 4, "vocab_size": 131}
    make_tiny(root / "base", "llama2", **over)
    write_tokenizer(root / "base")
    (root / "t.jinja").write_text(PUBLISHED["Llama-2"])
    rng = np.random.default_rng(0)
    rows = [
        {"instruction": "q" * int(rng.integers(1, 24)), "output": f"{n}" * int(rng.integers(1, 12)) + "."}
        for n in range(60)
    ]
    (root / "rows.json").write_text(json.dumps(rows))
    prepare_chat(root / "rows.json", root / "data", ChatTemplate(load_tokenizer(root / "base"), root / "t.jinja"), None)
    return root


def _config(folder: Path, grid: str, attention: str) -> str:
    path = folder / f"{''.join(filter(str.isalnum, grid + attention))}.yaml"
    text = YAML.format(base=folder / "base", data=folder / "data", grid=grid, attention=attention, output=folder / "no")
    path.write_text(text)
    return str(path)


def _observe(rank: int, world: int, paths: list[str]) -> list[dict[str, Any]]:
    found = [vars(observe(load_config(Path(path), []), RankEnv.read(), STEPS)) for path in paths]
    return found if rank == 0 else []


def test_the_loss_is_that_of_each_conversation_alone(folder: Path) -> None:
    mine = observe(load_config(Path(_config(folder, "tp: 1", FULL)), []), RankEnv(), 0, keep_world=False)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    # Linear interpolation by 2, as the run's.
    theirs.model.rotary_emb.inv_freq /= 2
    shards = open_shards(folder / "data")
    assert shards.scored is not None
    data = SampleDataset(shards, SEQUENCE)
    total, scored, seen = 0.0, 0, 0
    for index in step_indices(1234, 0, BATCH, len(data)).tolist():
        window = data.window(index)
        for number in range(int(window.document_ids.max()) + 1):
            tokens = window.tokens[window.document_ids == number]
            match = [
                n
                for n, start in enumerate(shards.starts)
                if (shards.read(int(start), min(int(start) + tokens.size, len(shards))).tolist() == tokens.tolist())
            ]
            if not match:  # padding
                continue
            start = int(shards.starts[match[0]])
            wanted = torch.from_numpy(shards.scored[start + 1 : start + tokens.size] != 0)
            ids = torch.from_numpy(tokens)
            with torch.no_grad():
                logits = theirs(ids[None]).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[wanted]
            total, scored = total + float(losses.sum()), scored + int(wanted.sum())
            seen += 1
    assert seen > BATCH  # windows hold several
    assert mine.losses[0] == pytest.approx(total / scored, rel=1e-5)


@pytest.mark.slow
@pytest.mark.crowd
def test_every_grid_trains_alike(folder: Path) -> None:
    cases = [(grid, attention) for attention in (S2, FULL) for grid in GRIDS]
    alone = {
        attention: observe(
            load_config(Path(_config(folder, "tp: 1", attention)), []), RankEnv(), STEPS, keep_world=False
        )
        for attention in (S2, FULL)
    }
    found = run_ranks(_observe, 2, [_config(folder, *case) for case in cases], timeout=300)[0]
    for (grid, attention), mine in zip(cases, found, strict=True):
        difference = compare(Observed(**mine), alone[attention])
        assert max(difference.loss, difference.norm, difference.gradient) <= 1e-5, (grid, attention, difference)
