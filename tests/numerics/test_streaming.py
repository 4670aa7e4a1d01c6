"""Streamed training against the run computed again from outside (fp64, explicit masks) and the unstreamed step.

Then probes of one token across the chunks' edges; planted faults are found.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from parallel.axes.kv_cache import KeyValueCache
from parallel.axes.stream import ParkedHalos
from pipeline.config.sections import LoraConfig
from pipeline.data.loader import Batch
from pipeline.data.packing import IGNORE
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.model import chunk
from pipeline.model.attention import layer as attention_layer
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import init_adapters, load_base, mark_trainable
from pipeline.planning import first_pass
from pipeline.planning.arch import read_arch
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.rope import RopePlan
from pipeline.planning.stream import StreamPlan, halo_bytes
from tests.numerics import attention_oracle, test_run_oracle
from tests.numerics.dropout_masks import Masks, Replay, recorded
from tests.numerics.movement import tensor_errors
from tests.numerics.run_cases import LAYERS, train_here, write_case
from tests.numerics.run_oracle import Oracle
from tests.support.plants import lost_halo_gradient, shifted_halo
from tests.support.single import single_groups
from tests.support.tiny_models import make_tiny

FIXED = {"group": "group_size: 16", "full_last": 0}
"""What streaming needs of a run: a group in tokens, and no step of full attention."""
RUNS: dict[str, dict[str, Any]] = {
    # 61 tokens and documents in every case; the last chunk is short.
    "multiples of the group, recomputed": {"stream": 16},
    "off its multiples, two rows": {
        "stream": 13,
        "model": "qwen2",
        "micro": 2,
        "shifted": "alternate",
        "recompute": "none",
    },
    "several hops, no mask": {"stream": 9, "model": "mistral", "sequence": 64, "masked": "false", "recompute": "none"},
    "weights from host memory": {"stream": 12, "engine": "zero3, offload: {params: cpu, optimizer: cpu}"},
    "gate and up in host memory": {"stream": 16, "recompute": "pointwise, gate_up: host"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_streamed_run_is_the_outside_one(name: str, tmp_path: Path) -> None:
    over = {**FIXED, **RUNS[name]}
    path = write_case(tmp_path, "run", over.pop("model", "llama"), **over)
    train_here(path)
    oracle = Oracle(path)
    test_run_oracle.check(path, oracle, oracle.run())


def test_dropout_is_replayed(tmp_path: Path) -> None:
    """A chunk's second pass drops what its first one did, and the whole is the run of an oracle that drops that."""
    path = write_case(tmp_path, "run", dropout=0.3, recompute="none", stream=16, **{**FIXED, "stride": "null"})
    with recorded() as masks:
        train_here(path)
    first: Masks = []
    for calls in masks:
        first.append([])
        sites = len(calls) // (4 * 7 * LAYERS)  # 4 micro-batches; 4 chunks, of which the last runs once
        for micro in itertools.batched(calls, 7 * sites * LAYERS):
            passes = list(itertools.batched(micro, sites * LAYERS))
            for number in range(3):
                for (_, one), (_, other) in zip(passes[number], passes[6 - number], strict=True):
                    assert torch.equal(one, other)
            for parts in zip(*passes[:4], strict=True):
                first[-1].append((parts[0][0], torch.cat([mask for _, mask in parts])))
    oracle = Oracle(path, drop=Replay([first], 1, 1, LAYERS, 0.3))
    test_run_oracle.check(path, oracle, oracle.run())


def make(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **over: Any) -> Callable[..., RankModel]:
    """A maker of equal models with adapters that do something, their embedding, norms and adapters trainable."""
    make_tiny(folder, kind, dtype=dtype, **over)
    arch = read_arch(folder)

    def build(recompute: str = "none", stream: int | None = None, **more: Any) -> RankModel:
        lora = LoraConfig(rank=3, targets=("q", "k", "v", "o", "down"))
        rope = RopePlan("linear", arch.rope_theta, 2.0, None)
        model = RankModel(arch, rope, lora, single_groups(), dtype, recompute, stream=stream, **more)
        load_base(model, HfCheckpoint(folder))
        init_adapters(model, 1)
        mark_trainable(model, ("lora", "embed", "norm"))
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.canonical_parameters():
            if ".lora_B" in name:
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model.train()

    return build


def step(model: RankModel, batch: Batch, spec: AttentionSpec) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and every gradient."""
    scored = max(int((batch.labels != IGNORE).sum()), 1)
    loss = float(model.train_step([batch], spec, 1 / scored)) / scored
    found = {name: p.grad.clone() for name, p in model.canonical_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return loss, found


def text(rows: int, tokens: int, documents: bool = False) -> Batch:
    """Random tokens, every second label scored; with documents of odd lengths if asked for."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(3, 128, (rows, tokens + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, ::2] = IGNORE
    owners = None
    if documents:
        owners = torch.cumsum(torch.rand(rows, tokens, generator=generator) < 0.07, dim=1).int()
    return Batch(ids[:, :-1], labels, owners)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RankModel]:
    """9 query heads on 3 KV heads: the split of the heads falls into a KV group."""
    return make(tmp_path_factory.mktemp("uneven"), "smollm2")


@pytest.mark.parametrize(
    ("group", "tokens_at_once", "rows", "tokens", "rule", "documents", "recompute"),
    [
        (16, 16, 1, 64, "upper_half", False, "none"),  # chunks are groups
        (16, 24, 2, 67, "upper_half", True, "full"),  # off the group, last chunk short, two rows
        (16, 8, 1, 61, "alternate", False, "none"),  # half a group: unshifted groups span two chunks
        (16, 9, 3, 55, "upper_half", True, "none"),  # several hops
        (10, 7, 1, 50, "upper_half", False, "full"),  # the last chunk is one token
        (16, 64, 1, 40, "upper_half", False, "none"),  # one chunk
        (64, 32, 1, 127, "upper_half", False, "none"),
    ],
)
def test_gradients_are_the_unstreamed_steps(
    uneven: Callable[..., RankModel],
    group: int,
    tokens_at_once: int,
    rows: int,
    tokens: int,
    rule: str,
    documents: bool,
    recompute: str,
) -> None:
    spec, batch = AttentionSpec("s2", group, rule), text(rows, tokens, documents)
    expected_loss, expected = step(uneven(), batch, spec)
    streamed = uneven(recompute, tokens_at_once)
    loss, found = step(streamed, batch, spec)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    errors = tensor_errors(found, expected, None)
    assert len(errors) > 20 and max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])
    # Host memory was taken once, and as much as the formula says.
    assert streamed.stream is not None
    cut = StreamPlan.of(tokens, tokens_at_once, streamed.groups.plan)
    formula = halo_bytes(cut, streamed.arch, spec, streamed.groups.plan, rows, 4)
    assert streamed.stream.parked.host_bytes == formula.parked
    # A step that was abandoned leaves nothing to the next.
    streamed.stream.parked.keep_gradient((0, 0, 1), torch.ones(1))
    again = step(streamed, batch, spec)[1]
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_bf16_is_no_further_from_fp32_than_twice_the_unstreamed_step(tmp_path: Path) -> None:
    spec, batch = AttentionSpec("s2", 16), text(1, 200)
    narrow = make(tmp_path / "narrow", "mistral", torch.bfloat16)  # heads of 24: halos end off a cache line
    exact = narrow()
    _, expected = step(exact.float(), batch, spec)
    _, plain = step(narrow(), batch, spec)
    _, streamed = step(narrow(stream=24), batch, spec)
    allowed, found = (tensor_errors(each, expected, None) for each in (plain, streamed))
    for name, error in found.items():
        assert error <= 2 * allowed[name] + 1e-6, (name, error, allowed[name])


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RankModel]:
    return make(tmp_path_factory.mktemp("one"), "llama3", num_hidden_layers=1, tie_word_embeddings=False)


def sees(query: int, tokens: int, group: int) -> set[int]:
    """Keys that some head shows `query`, by the definition."""
    return set(attention_oracle.masks(1, tokens, 4, 2, group)[0, :, query].any(0).nonzero().flatten().tolist())


@pytest.mark.parametrize("query", [23, 24, 31, 36, 47, 48, 55])
def test_one_token_reaches_across_chunks_as_far_as_the_definition_says(
    one_layer: Callable[..., RankModel], query: int
) -> None:
    """One layer, all tokens distinct, one label: embedding rows with a gradient are those the query sees."""
    tokens = torch.arange(3, 67)[None]
    labels = torch.full_like(tokens, IGNORE)
    labels[0, query] = 5
    _, found = step(one_layer(stream=12), Batch(tokens, labels, None), AttentionSpec("s2", 16))
    reached = {int(row) - 3 for row in found["embedding.weight"].abs().sum(1).nonzero()}
    assert reached == sees(query, 64, 16)
    assert min(reached) < query // 12 * 12 or query % 12 > 8, "the case would not cross a chunk's edge"


def test_one_token_changes_exactly_the_losses_that_see_it(one_layer: Callable[..., RankModel]) -> None:
    model, spec = one_layer(stream=12), AttentionSpec("s2", 16)
    tokens = torch.arange(3, 67)[None]

    def losses(tokens: torch.Tensor) -> list[float]:
        found = []
        for query in range(14, 34):
            labels = torch.full_like(tokens, IGNORE)
            labels[0, query] = 5
            found.append(step(model, Batch(tokens, labels, None), spec)[0])
        return found

    changed = tokens.clone()
    changed[0, 20] = 100
    before, after = losses(tokens), losses(changed)
    differ = {query for query, one, other in zip(range(14, 34), before, after, strict=True) if one != other}
    assert differ == {query for query in range(14, 34) if 20 in sees(query, 64, 16)}
    assert max(differ) >= 24, "it reaches the next chunk"


@pytest.mark.parametrize("at_once", [7, 16, 40, 64])
def test_scores_of_chunked_prefill_are_those_of_one_pass(uneven: Callable[..., RankModel], at_once: int) -> None:
    """Full attention; two windows one after the other through one cache, then a longer one."""
    full, whole, chunked = AttentionSpec("full", 2), uneven().eval(), uneven(prefill=at_once).eval()
    for tokens, seed in ((64, 0), (64, 1), (77, 2)):
        ids = torch.randint(3, 128, (2, tokens), generator=torch.Generator().manual_seed(seed))
        expected, found = whole.token_nll(ids, full), chunked.token_nll(ids, full)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5) and float(expected.std()) > 0.1
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORE)
        for one, other in zip(
            whole.token_scores(ids, labels, full), chunked.token_scores(ids, labels, full), strict=True
        ):
            assert torch.allclose(one.float(), other.float(), rtol=1e-5, atol=1e-5)


def test_a_stale_cache_is_found(uneven: Callable[..., RankModel]) -> None:
    """What the second window reads are its own keys and values: with the first one's its losses are others."""
    full, chunked = AttentionSpec("full", 2), uneven(prefill=16).eval()
    first, second = (torch.randint(3, 128, (1, 64), generator=torch.Generator().manual_seed(n)) for n in (5, 6))
    expected = chunked.token_nll(second, full)
    chunked.token_nll(first, full)
    with mock.patch.object(KeyValueCache, "keep"):
        stale = chunked.token_nll(second, full)
    assert torch.equal(stale[:, :15], expected[:, :15]) and float((stale - expected).abs().max()) > 1e-2


def wrong_chunk() -> Any:
    """The parked halo of one layer is another's."""
    honest = ParkedHalos._copy
    return mock.patch.object(ParkedHalos, "_copy", lambda self, key: honest(self, (0, *key[1:])))


def same_positions() -> Any:
    """Every chunk begins at position 0."""
    honest = chunk.rope_tables
    return mock.patch.object(chunk, "rope_tables", lambda plan, width, at: honest(plan, width, at - at[0]))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RankModel]:
    """Enough layers for the first pass to shorten many."""
    return make(tmp_path_factory.mktemp("deep"), "llama3", num_hidden_layers=7, tie_word_embeddings=False)


def enters(model: RankModel) -> list[list[int]]:
    """Filled while the model runs without gradients: tokens that enter each layer, a list a layer."""
    found: list[list[int]] = []
    for layer in model.stages[0].decoder.layers:
        own: list[int] = []

        def count(_: Any, args: Any, kwargs: Any, own: list[int] = own) -> None:
            if not torch.is_grad_enabled():
                own.append(len(kwargs["hidden_states"]))

        layer.register_forward_pre_hook(count, with_kwargs=True)
        found.append(own)
    return found


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("rule", ["upper_half", "alternate", "odd_layers"])
def test_the_first_pass_computes_what_is_read_alone(
    deep: Callable[..., RankModel], rule: str, documents: bool, recompute: str
) -> None:
    """Three chunks of three groups: half a group more enters each layer further down, and no gradient is another."""
    spec, batch = AttentionSpec("s2", 16, rule), text(2, 140, documents)
    _, expected = step(deep(), batch, spec)
    short, old = deep(recompute, 48), deep(recompute, 48, without=("short_first_pass",))
    counted, before = enters(short), enters(old)
    _, found = step(short, batch, spec)
    _, same = step(old, batch, spec)
    for gradients in (found, same):
        errors = tensor_errors(gradients, expected, None)
        assert len(errors) > 20 and max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])
    # Beyond two, there are those of layers that are to run again.
    first, old_first = ([numbers[:2] for numbers in layers] for layers in (counted, before))
    assert old_first == [[48, 48]] * 7
    if documents:
        assert all(number <= 48 for layer in first for number in layer) and sum(map(sum, first)) < 7 * 96 - 60
    else:
        # Under odd_layers the last of seven is an even one, without a halo: one token stands for none.
        last = 8 if rule != "odd_layers" else 0
        assert first == [[48] * 2] + [[max(1, min(last + 8 * (6 - layer), 48))] * 2 for layer in range(1, 7)]


def test_a_chunk_that_no_later_one_reads_has_no_first_pass(deep: Callable[..., RankModel]) -> None:
    """Documents that end where chunks do; of the last, which crosses an edge, the chunk before is needed."""
    tokens, spec = 192, AttentionSpec("s2", 16)
    plain = text(1, tokens)
    owners = torch.tensor([0] * 48 + [1] * 48 + [2] * 96)[None]
    batch = Batch(plain.tokens, plain.labels, owners)
    _, expected = step(deep(), batch, spec)
    model = deep(stream=48)
    counted = enters(model)
    _, found = step(model, batch, spec)
    assert max(tensor_errors(found, expected, None).values()) < 1e-5
    assert counted == [[48], [48], [40], [32], [24], [16], [8]], "of the third of four chunks alone"


def too_short() -> Any:
    """A layer of the first pass is not given what its queries see before them."""
    return mock.patch.object(first_pass, "_first_seen", lambda layout, spec, heads, token: token)


def first_positions() -> Any:
    """The last tokens of a chunk are rotated as its first ones."""

    def wrong(context: Any, tokens: int) -> Any:
        return context.cos[:tokens], context.sin[:tokens]

    return mock.patch.object(attention_layer, "_last_positions", wrong)


@pytest.mark.parametrize(
    "plant", [lost_halo_gradient, wrong_chunk, shifted_halo, same_positions, too_short, first_positions]
)
def test_a_fault_is_found(deep: Callable[..., RankModel], plant: Callable[[], Any]) -> None:
    spec, batch = AttentionSpec("s2", 16), text(1, 60)
    _, expected = step(deep(), batch, spec)
    with plant():
        _, found = step(deep(stream=40), batch, spec)
    assert max(tensor_errors(found, expected, None).values()) > 1e-2


def test_a_signal_between_chunks_leaves_a_model_that_trains_on(uneven: Callable[..., RankModel]) -> None:
    """`between` may raise at any chunk's end; the next step is as if nothing had been."""
    spec, batch = AttentionSpec("s2", 16), text(1, 60)
    model = uneven(stream=16)
    _, expected = step(model, batch, spec)

    def raising(after: int) -> Callable[[], None]:
        calls: Iterator[int] = itertools.count(1)

        def between() -> None:
            if next(calls) == after:
                raise InterruptedError

        return between

    for after in range(1, 7):  # three forwards, then four backwards with three pauses between them
        with pytest.raises(InterruptedError):
            model.train_step([batch], spec, 1.0, between=raising(after))
        for parameter in model.parameters():
            parameter.grad = None
        _, found = step(model, batch, spec)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
