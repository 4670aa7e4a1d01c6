"""Retrieval's one forward against transformers' greedy `generate`, and every grid and engine against one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from parallel.world.collectives import sum_over
from parallel.world.groups import destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline.build import build_model, connect, open_base
from pipeline.config.run import RunConfig
from pipeline.config.sections import LoraConfig
from pipeline.config.yaml_file import load_config
from pipeline.data.packing import IGNORE
from pipeline.evaluation.prompts import Case
from pipeline.evaluation.retrieval import score_cases
from pipeline.model.greedy import greedy
from pipeline.model.layers import loss
from pipeline.model.rank_model import RankModel
from pipeline.planning.attention_layout import AttentionSpec, full_attention
from pipeline.planning.run_plan import plan_run
from pipeline.planning.stream import cut_for_greedy
from tests.support.ranks import run_ranks
from tests.support.single import single_groups
from tests.support.tiny_models import make_tiny

FULL = AttentionSpec("full", 2)
ANSWER = 4
VOCAB = 131
"""Two tensor-parallel ranks hold 66 and 65 rows."""


TWINS = [(3, 4), (10, 100), (64, 65), (66, 130)]
"""Tokens of equal rows in the output matrix, so of equal logits: some on one tensor-parallel rank, some on two."""


def write_run(folder: Path) -> Path:
    file = make_tiny(folder / "base", "llama2", vocab_size=VOCAB, num_hidden_layers=4) / "model.safetensors"
    weights = load_file(file)
    rows = torch.randn(len(TWINS), weights["lm_head.weight"].shape[1], generator=torch.Generator().manual_seed(7))
    for row, pair in zip(rows, TWINS, strict=True):
        # Large, so that they win often.
        weights["lm_head.weight"][list(pair)] = 2 * row
    save_file(weights, file, metadata={"format": "pt"})
    path = folder / "run.yaml"
    path.write_text(
        f"model: {{path: {folder / 'base'}, context: 64, dtype: fp32}}\n"
        f"data: {{path: {folder}}}\ntrain: {{steps: 1, global_batch: 4}}\noutput: {folder / 'never'}\n"
    )
    return path


def model_of(config: RunConfig, groups: Any) -> RankModel:
    plan = plan_run(config, groups.plan.world_size)
    base = open_base(config, plan.arch)
    return build_model(plan, LoraConfig(rank=0), groups, base).eval()


def prompts() -> torch.Tensor:
    return torch.randint(0, VOCAB, (6, 33), generator=torch.Generator().manual_seed(0))


def one_by_one(scores: Any, prompts_BS: torch.Tensor) -> torch.Tensor:
    """Greedy decoding by asking about every token of the vocabulary: for models that cannot generate."""
    rows, tokens = len(prompts_BS), prompts_BS
    for _ in range(ANSWER):
        asked = torch.cat((tokens.repeat_interleave(VOCAB, 0), torch.arange(VOCAB).repeat(rows)[:, None]), 1)
        labels = torch.full_like(asked, IGNORE)
        labels[:, -2] = asked[:, -1]
        hits = scores(asked, labels)[1][:, -1].view(rows, VOCAB)
        assert hits.sum(1).tolist() == [1] * rows, "greedy decoding picks one token"
        tokens = torch.cat((tokens, hits.float().argmax(1, keepdim=True)), 1)
    return tokens[:, prompts_BS.shape[1] :]


@pytest.mark.parametrize("kind", ["llama2", "smollm2", "qwen2"])
def test_an_answer_is_found_exactly_where_generate_gives_it(kind: str, tmp_path: Path) -> None:
    """generate's own tokens score 1; with any one of them changed they score 0."""
    make_tiny(tmp_path / "base", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    asked = prompts() % 128
    with torch.no_grad():
        given = theirs.generate(
            asked,
            max_new_tokens=ANSWER,
            min_new_tokens=ANSWER,
            do_sample=False,
            attention_mask=torch.ones_like(asked),
            eos_token_id=None,
            pad_token_id=0,
        )
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {tmp_path / 'base'}, context: 64, dtype: fp32}}\n"
        f"data: {{path: {tmp_path}}}\ntrain: {{steps: 1, global_batch: 1}}\noutput: {tmp_path / 'never'}\n"
    )
    model = model_of(load_config(tmp_path / "run.yaml", []), single_groups())

    def scores(tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return model.token_scores(tokens, labels, FULL)

    found = score_cases(scores, [Case(row, ANSWER) for row in given.numpy()])
    assert found[:, 0].tolist() == [1.0] * len(asked)
    logits = theirs(given).logits.detach()[:, -ANSWER - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), given[:, -ANSWER:], reduction="none").mean(1)
    assert torch.allclose(found[:, 2].float(), nll, atol=1e-4)
    for place in range(1, ANSWER + 1):
        wrong = given.numpy().copy()
        wrong[:, -place] = (wrong[:, -place] + 1) % 128
        found = score_cases(scores, [Case(row, ANSWER) for row in wrong])
        assert found[:, 0].tolist() == [0.0] * len(asked)
        with torch.no_grad():
            chosen = theirs(torch.from_numpy(wrong)).logits[:, -ANSWER - 1 : -1].argmax(-1)
        rest = (chosen == torch.from_numpy(wrong)[:, -ANSWER:])[:, 1:].all(1)
        assert found[:, 1].tolist() == rest.double().tolist()


@pytest.mark.parametrize("prefill", [None, 8, 1])
@pytest.mark.parametrize("kind", ["smollm2", "llama3"])
def test_greedy_decoding_writes_what_generate_writes(kind: str, prefill: int | None, tmp_path: Path) -> None:
    """Prompts of unequal lengths at once, whatever is guessed; the past's keys and values are used."""
    make_tiny(tmp_path / "base", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    asked = [row[: 33 - 3 * n].tolist() for n, row in enumerate(prompts() % 128)]
    given = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.no_grad():
            given.append(
                theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
            )
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {tmp_path / 'base'}, context: 64, dtype: fp32}}\ndata: {{path: {tmp_path}}}\n"
        f"train: {{steps: 1, global_batch: 1}}\noutput: {tmp_path / 'never'}\n"
    )
    set_ = [] if prefill is None else [f"eval.prefill={prefill}"]
    model = model_of(load_config(tmp_path / "run.yaml", set_), single_groups())
    runs: list[int] = []
    honest = model.score_chunk
    model.score_chunk = lambda batch, past, *given: (runs.append(past.shard.start), honest(batch, past, *given))
    assert greedy(model, asked, 9, FULL) == given
    spent = len(runs)
    assert (runs.count(0) == 1) == (len(set(runs)) > 1), "what is fixed runs once"
    runs.clear()
    half = [row[:5] + [1, 2, 3] for row in given]
    assert greedy(model, asked, 9, FULL, guesses=half) == given
    assert len(runs) < spent, "good guesses save forwards"
    stops = [row[3] for row in given]
    written = greedy(model, asked, 9, FULL, lambda row, ids: ids[-1] == stops[row])
    assert written == [row[: row.index(stop) + 1] for row, stop in zip(given, stops, strict=True)]


def test_the_end_of_a_window_is_cut_off_where_it_fits() -> None:
    grid = single_groups().plan
    assert cut_for_greedy(1000, 1130, None, grid).starts == (0, 999)
    assert cut_for_greedy(1000, 1130, 400, grid).starts == (0, 333, 666, 999)
    assert cut_for_greedy(1000, 1130, 100, grid).starts == tuple(range(0, 1000, 142))  # room for 131 at the end
    assert cut_for_greedy(100, 230, None, grid).starts == (0,)
    assert cut_for_greedy(1, 4, 2, grid).starts == (0,)


@mock.patch.multiple(loss, LEAST_TOKENS=12, CHUNK_LOGITS=1)  # several tiles
def _observe(rank: int, world: int, path: str, grids: list[list[str]]) -> list[Any]:
    """Hits and losses of every grid, in the same processes."""
    found = []
    for grid in grids:
        config = load_config(Path(path), grid)
        env = RankEnv.read()
        groups = connect(plan_run(config, env.world_size), env)
        model = model_of(config, groups)
        tokens = torch.from_numpy(np.load(Path(path).with_name("cases.npy")))
        labels = torch.full_like(tokens, IGNORE)
        labels[:, -ANSWER - 1 : -1] = tokens[:, -ANSWER:]
        full = replace(full_attention(config.attention), lend_from=0)  # queries move at this length, too
        nll, hits = model.token_scores(tokens, labels, full)
        found.append((nll[:, -ANSWER:].cpu(), hits[:, -ANSWER:].cpu(), nll[:, :-ANSWER].abs().sum().item()))
        # The first replica guesses right and is done at once; in lockstep it runs on with the others.
        best, own = np.load(Path(path).with_name("best.npy")), slice(groups.data_rank, None, groups.plan.dp)

        def goes_on(mine: bool, groups: Any = groups) -> bool:
            return bool(sum_over(groups.replicas, torch.tensor([float(mine)], device=groups.device)) > 0)

        guesses = best[own].tolist() if groups.data_rank == 0 else ()
        written = greedy(model, prompts()[own].tolist(), ANSWER, full, guesses=guesses, goes_on=goes_on)
        found[-1] += (written == best[own].tolist(),)
        model.close()
        destroy_groups(keep_world=True)
    return found


GRIDS = [
    ["parallel.tp=2"],
    ["parallel.cp=2"],
    ["parallel.pp=2"],
    ["parallel.pp=2", "parallel.virtual=2"],
    ["parallel.engine=zero3"],
    ["parallel.engine=zero3", "parallel.tp=2"],
]


def test_every_grid_and_engine_finds_what_one_process_finds(tmp_path: Path) -> None:
    """Ties too: of equal logits on two tensor-parallel ranks the smaller id is picked, as by argmax."""
    path = write_run(tmp_path)
    model = model_of(load_config(path, []), single_groups())
    best = one_by_one(lambda tokens, labels: model.token_scores(tokens, labels, FULL), prompts())
    given = torch.cat((prompts(), best), 1)
    assert len({pair[0] for pair in TWINS} & set(best.flatten().tolist())) >= 2, "ties decide some of it"
    # Rows 6..11: the last token's twin, which has the same logit and must not count.
    other = given.clone()
    twin = dict(TWINS)
    for row in other:
        row[-1] = twin.get(int(row[-1]), (int(row[-1]) + 1) % VOCAB)
    np.save(tmp_path / "best.npy", best.numpy())
    np.save(tmp_path / "cases.npy", torch.cat((given, other)).numpy())
    destroy_groups()
    (alone,) = _observe(0, 1, str(path), [[]])
    destroy_groups()
    assert alone[1][:6].all() and not alone[1][6:, -1].any() and alone[1][6:, :-1].all() and alone[2] == 0
    for found in run_ranks(_observe, 2, str(path), GRIDS, timeout=240):
        for grid, (nll, hits, rest, written) in zip(GRIDS, found, strict=True):
            assert torch.equal(hits, alone[1]), grid
            assert torch.allclose(nll, alone[0], atol=1e-4) and rest == 0, grid
            assert written, grid


@pytest.mark.gpu
def test_smollm2_shape_on_a_gpu_agrees_with_generate(tmp_path: Path) -> None:
    """bf16, SmolLM2's width and vocabulary, 2048 tokens: greedy decoding's answers but for logits too near to tell."""
    over = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192}
    make_tiny(tmp_path / "base", "smollm2", **over, num_hidden_layers=6)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval().cuda()
    asked = torch.randint(0, 49152, (4, 2000), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mask = torch.ones_like(asked).cuda()
        options = {
            "max_new_tokens": 8,
            "min_new_tokens": 8,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        given = theirs.generate(asked.cuda(), attention_mask=mask, **options)
        logits = theirs(given).logits[:, -9:-1].float()
    top = logits.topk(2, dim=-1).values
    clear = (top[..., 0] - top[..., 1] > 0.05 * logits.std()).cpu()
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{path: {tmp_path / 'base'}, context: 8192, dtype: bf16}}\n"
        f"data: {{path: {tmp_path}}}\ntrain: {{steps: 1, global_batch: 1}}\noutput: {tmp_path / 'never'}\n"
    )
    model = model_of(load_config(path, []), single_groups())
    tokens = given.cpu()
    labels = torch.full_like(tokens, IGNORE)
    labels[:, -9:-1] = tokens[:, -8:]
    hits = model.token_scores(tokens, labels, FULL)[1][:, -8:].cpu()
    assert clear.float().mean() > 0.7
    assert hits[clear].all()
