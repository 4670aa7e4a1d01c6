"""Counts of work against definitions: torch's own operation counter, brute force, and sums over ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.planner.traffic import layer_traffic, traffic
from pipeline.planner.work import FORWARD, attention_pairs, layer_work, loss_work, useful_operations
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.base_form import PRODUCTS
from pipeline.planning.context_shards import halo_elements
from pipeline.planning.recompute import RecomputePolicy
from pipeline.planning.run_plan import RunPlan
from pipeline.planning.tensors import projection_shape
from tools.support.plan_points import Point


def plan_of(model: str = "llama3-8b", ranks: int = 1, context: int = 4096, **settings: object) -> RunPlan:
    return Point("test", model, ranks, context, {"recompute": "full", **settings}, "held").plan()


@pytest.mark.parametrize("tp", [1, 4])
def test_products_are_what_torch_counts(tp: int) -> None:
    plan = plan_of(ranks=tp, tp=tp)
    arch, tokens = plan.arch, plan.sequence
    with FlopCounterMode(display=False) as counter:
        for parts in PRODUCTS:
            rows, columns = sum(projection_shape(p, arch)[0] for p in parts), projection_shape(parts[0], arch)[1]
            rows, columns = (rows, columns // tp) if parts[0] in ("o", "down") else (rows // tp, columns)
            torch.empty(tokens, columns, device="meta") @ torch.empty(columns, rows, device="meta")
        layer = counter.get_total_flops()
        for _ in range(2):
            torch.empty(tokens, arch.hidden, device="meta") @ torch.empty(arch.hidden, arch.vocab // tp, device="meta")
    work = layer_work(plan.layer)
    assert work.forward.products == work.backward.products == layer
    assert loss_work(plan.layer).products == counter.get_total_flops() - layer
    down = 2 * tokens * arch.ffn * arch.hidden // tp
    (policy,) = set(plan.recompute)
    assert work.again[policy].products == layer - down, "what leaves the layer is not made again"


@pytest.mark.parametrize(("tp", "cp", "group"), [(1, 1, 16), (2, 4, 16), (1, 8, 24), (2, 2, 64)])
def test_attention_pairs_are_those_of_the_mask(tp: int, cp: int, group: int) -> None:
    """Brute force: query t of a head sees the keys of its group up to t; a rank has its heads and its tokens."""
    sequence = 64
    plan = plan_of(ranks=tp * cp, context=sequence, tp=tp, cp=cp, group=group)
    heads = plan.arch.heads
    counted = dict.fromkeys(range(tp * cp), 0)
    for head, query in product(range(heads), range(sequence)):
        shift = group // 2 if head >= heads // 2 else 0
        start = max(0, (query + shift) // group * group - shift)
        counted[query // (sequence // cp) * tp + head // (heads // tp)] += query - start + 1
    assert {rank: attention_pairs(plan.layer, rank) for rank in counted} == counted
    assert attention_pairs(plan.layer) == max(counted.values())


@pytest.mark.parametrize("window", [8, 24, 64])
def test_of_a_sliding_window_the_keys_it_shows_are_useful(window: int) -> None:
    """Brute force; at work are a window's queries at a time and all keys that any of them sees."""
    sequence = 64
    plan = plan_of("llama2-7b", context=sequence, attention="full")
    whole, heads = useful_operations(plan), plan.arch.heads
    windowed = replace(plan, arch=replace(plan.arch, sliding_window=window))
    seen = sum(query - max(0, query - window + 1) + 1 for query in range(sequence))
    every = sequence * (sequence + 1) // 2
    a_pair = 3 * FORWARD * plan.arch.head_dim * heads * plan.arch.layers * plan.batch.global_batch
    assert useful_operations(windowed) == whole - a_pair * (every - seen)
    assert useful_operations(replace(windowed, attention=AttentionSpec("s2", 8))) < useful_operations(windowed)
    blocks = [range(start, min(start + window, sequence)) for start in range(0, sequence, window)]
    computed = sum(len(block) * (block[-1] - max(0, block[0] - window + 1) + 1) for block in blocks)
    assert attention_pairs(windowed.layer) == heads * (computed if window < sequence else every)


@pytest.mark.parametrize("head", [False, True])
def test_useful_operations_are_what_torch_counts_of_peft(head: bool) -> None:
    """Forward and backward of transformers' model with PEFT's adapters, but for what attention's mask hides."""
    plan = plan_of("llama2-7b", context=64)
    shape = replace(plan.arch, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, layers=2, vocab=40)
    words = ("lora", "norm", "embed", *(["lm_head"] if head else []))
    settings = replace(plan.config, train=replace(plan.config.train, trainable=words))
    plan = replace(plan, arch=shape, config=settings, full_attention=AttentionSpec("full", 64))
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=40,
        attn_implementation="eager",
    )
    lora = plan.config.lora
    targets = [f"{name}_proj" for name in lora.targets]
    whole = ["embed_tokens", *(["lm_head"] if head else [])]
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=lora.rank, target_modules=targets, modules_to_save=whole)
    )
    tokens = torch.randint(40, (plan.batch.global_batch, 64))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    seen, every = 64 * 65 // 2, 64 * 64
    masked = 3 * FORWARD * shape.head_dim * shape.heads * shape.layers * plan.batch.global_batch * (every - seen)
    assert useful_operations(plan, full=True) == counter.get_total_flops() - masked


def test_halos_are_half_a_group_of_the_shifted_heads() -> None:
    """docs/RESULTS.md: 8 MiB of K and V at 32k, CP2 and G a quarter; 70B's 8 KV heads of 128 in bf16, half of them."""
    plan = plan_of("llama2-70b", ranks=2, context=32768, cp=2)
    assert layer_traffic(plan.layer).halo == 8 * 2**20
    spec = AttentionSpec("s2", 8192)
    assert halo_elements((64, 8, 128), spec, 32768, 1, 1) == 0
    still = AttentionSpec("full", 8192, lend_from=None)
    assert halo_elements((64, 8, 128), still, 32768, 1, 2) == 2 * 16384 * 8 * 128
    # The last of two ranks keeps its queries up to sqrt(3) / 2 of the sequence; those after it travel.
    moved = halo_elements((64, 8, 128), AttentionSpec("full", 8192), 32768, 1, 2) / 128 - 2 * 16384 * 8
    assert moved / 64 == pytest.approx(32768 * (1 - 0.75**0.5), abs=2)


def test_full_attention_over_context_ranks_is_counted_even() -> None:
    """As one rank's share of one process's work; without it 1.5 times that, as MLPerf's shape has it at CP2."""
    plan = plan_of("llama2-70b", ranks=2, context=8192, cp=2, attention="full")
    plans = [plan, replace(plan, attention=replace(plan.attention, lend_from=None))]
    alone = 64 * 8192 * 8193 // 2
    assert attention_pairs(plans[0].layer) == pytest.approx(alone / 2, rel=1e-3)
    assert attention_pairs(plans[1].layer) == pytest.approx(1.5 * alone / 2, rel=1e-3)
    assert layer_traffic(plans[0].layer).halo > layer_traffic(plans[1].layer).halo == 2 * 4096 * 8 * 128 * 2


def test_weights_pass_once_a_pass_and_gradients_once_a_step() -> None:
    """DESIGN: ZeRO-3 over CP8 moves 1.7 GB of 70B's weights a layer, of which an eighth is this rank's own."""
    plan = plan_of("llama2-70b", ranks=8, context=32768, cp=8, engine="zero3", params="cpu", optimizer="cpu")
    moved = traffic(plan)
    layer = 855_638_016 * 2
    assert moved.gather == layer * 7 / 8 and moved.copy == layer / 8
    assert layer_traffic(plan.layer).tensor_forward == 0
    # 296.2M trained elements: fp32 gradients summed, bf16 weights gathered.
    assert moved.gradients == pytest.approx(296.2e6 * 6 * 7 / 8, rel=1e-3)


def test_a_base_in_8_bits_makes_its_products_there_and_one_in_4_decodes_before_each() -> None:
    plain, eight, four = (layer_work(plan_of(base=base).layer) for base in ("bf16", "fp8", "nf4"))
    assert eight.forward.rounded == eight.backward.rounded == plain.forward.products == four.backward.products
    assert eight.forward.products == eight.again[next(iter(plan_of().recompute))].products == 0
    arch, tokens = plan_of().arch, 4096
    shapes = [projection_shape(part, arch) for parts in PRODUCTS for part in parts]
    elements = sum(rows * columns for rows, columns in shapes)
    # A byte read and one written of what is transposed; of a row 2 bytes read and one written, but of SwiGLU's product,
    # of which one byte is written in place of two.
    widths = [
        (sum(projection_shape(p, arch)[0] for p in parts), projection_shape(parts[0], arch)[1]) for parts in PRODUCTS
    ]
    more = sum(
        3 * columns if parts != ("down",) else -columns for parts, (_, columns) in zip(PRODUCTS, widths, strict=True)
    )
    assert eight.forward.pointwise - plain.forward.pointwise == tokens * more
    rounded = 3 * tokens * sum(rows for rows, _ in widths)
    assert eight.backward.pointwise - plain.backward.pointwise == rounded + 2 * elements
    # Half a byte a value, its block's magnitude, a float32 mean and scale a row; two bytes written.
    stored = elements / 2 + elements / 64 + 8 * sum(rows for rows, _ in shapes)
    assert four.forward.pointwise - plain.forward.pointwise == stored + 2 * elements
    streamed = layer_work(plan_of(base="nf4", stream=1024, group=1024).layer)
    assert streamed.forward.pointwise - plain.forward.pointwise == 4 * (stored + 2 * elements)
    assert streamed.forward.products == plain.forward.products


def test_under_tensor_parallelism_fp8_copies_the_tiles_that_lie_apart() -> None:
    """What a column-parallel product makes and a row-parallel one reads, and the gradients of both, twice each."""
    plan = plan_of("llama2-70b", ranks=4, context=8192, tp=4, base="fp8")
    moved = layer_work(plan.layer).moved
    local = (10240 + 2 * 28672) // 4 + (8192 + 28672) // 4
    assert moved[RecomputePolicy.NONE].pointwise == 2 * 8192 * local * 2 * 2
    attention = (10240 + 8192) // 4
    assert moved[RecomputePolicy.GATE_UP].pointwise == 2 * 8192 * attention * 2 * 2
    assert moved[RecomputePolicy.FULL].pointwise == 3 * 8192 * attention * 2 * 2, "and forward once more"
    for other in (plan_of("llama2-70b", base="fp8"), plan_of("llama2-70b", ranks=4, tp=4, context=8192)):
        assert not any(work.pointwise for work in layer_work(other.layer).moved.values())
    short = plan_of("llama2-70b", ranks=4, context=2048, tp=4, base="fp8")
    assert not layer_work(short.layer).moved[RecomputePolicy.NONE].pointwise, "one tile lies as it is wanted"
