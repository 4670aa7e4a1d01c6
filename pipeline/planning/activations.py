"""What one layer keeps for its backward pass and what it takes while it is at work, by recompute policy; no torch.

The peak of a backward pass is not always at its begin: layers give back what they kept as it comes past them, and a
layer that runs again takes for that moment what others keep. `peak_of` goes along a stage's layers.

Counted in elements a token first; sizes of a rank. The terms are those that a profile of allocations shows; what they
miss at the measured shapes is in tests/unit/planning/test_memory.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from pipeline.planning.base_form import work_bytes
from pipeline.planning.context_shards import halo_elements, lent_tokens
from pipeline.planning.layer_plan import LayerPlan
from pipeline.planning.recompute import RecomputePolicy
from pipeline.planning.tile_size import tile_tokens

LOGITS = 3 * 4 * (1 << 25)
"""Bytes of one chunk of the loss: logits, their exponentials and their gradient in fp32 (`loss.CHUNK_LOGITS` each)."""
PARKED = 2
"""Layers whose gate and up are on the GPU while they are on their way to or from the host (`layers.parking`)."""
COLUMN = ("q", "k", "v", "gate", "up")
FULL, GATE_UP, HOST, FP8, POINTWISE, NONE = RecomputePolicy


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer of one rank and micro-batch, by policy."""

    kept: dict[RecomputePolicy, int]
    """On the GPU, from a layer's forward to its backward."""
    at_work: dict[RecomputePolicy, int]
    """The most its backward takes beside that."""
    gate_up: int
    """Of gate and up in the model's dtype: what HOST keeps in host memory."""


@cache
def layer_memory(plan: LayerPlan) -> LayerMemory:
    """Count one layer."""
    arch, tp, rank, width, targets = plan.arch, plan.tp, plan.rank, plan.width, plan.targets
    tokens = plan.tokens(plan.at_once)
    query, key_value = arch.heads * arch.head_dim // tp, arch.kv_heads * arch.head_dim // tp
    hidden, ffn = arch.hidden // tp, arch.ffn // tp
    # An MLP with biases, or of another family's linears, goes the way of one with adapters: not through tiles.
    family = plan.family
    adapted = family != "local" or arch.mlp_bias or any(target in ("gate", "up", "down") for target in targets)
    # What enters and leaves attention's kernels, and fp32 log-sum-exps.
    attended = 2 * query + 2 * key_value + 4 * arch.heads // tp // width
    # What norms make for adapters; where the norm is inside a linear nothing can make it again.
    normed = hidden * (any(target in "qkv" for target in targets) + any(target in ("gate", "up") for target in targets))
    low = {target: rank * (tp if target in COLUMN else 1) for target in targets}
    inner = sum(low.get(target, 0) for target in ("gate", "up", "down")) // tp
    # What norms of queries and keys keep: their inputs.
    heads = query + key_value if arch.qk_norm else 0
    # The input of both norms, and of the adapters what the frozen products do not keep.
    base = 2 * hidden + attended + heads + sum(low.values()) // tp + normed * (family == "te")
    product = ffn * ("down" in targets)
    again = query * ("o" in targets) + normed * (family != "te") + product
    kept = {
        FULL: hidden,
        # A checkpointed MLP of other kinds keeps its input, which a frozen one has a norm make again.
        GATE_UP: base + hidden * adapted - inner,
        # An adapter on down has its input kept: made again it would need gate and up as they were.
        HOST: base + product,
        FP8: base + product + (2 * ffn + 8) // width,
        POINTWISE: base + 2 * ffn,
        NONE: base + 2 * ffn + again,
    }
    # Attention's backward: queries, output and the gradients of both; keys, values and theirs; two hidden states. And
    # of heads that go through a kernel together, with S² half: queries' gradients in fp32 and, with GQA, those of
    # keys and values by query heads.
    halves = 2 if _attends_all(plan) else 1
    grouped = arch.kv_heads < arch.heads
    attention = 4 * query + halves * (1 + grouped) * query + 4 * key_value + 2 * hidden
    of_tile = min(tokens, tile_tokens(2 * ffn + 2 * arch.hidden, tp))
    tile = of_tile * (6 * ffn + 4 * arch.hidden)
    # Of a layer that runs again all that POINTWISE keeps, but gate and up; of a frozen MLP wide tensors of one tile.
    mlp = tokens * (3 * hidden + 3 * query + 2 * key_value + heads) + tile
    # The gradient of the product; that of gate and up lies over them, but over those of family te, which are views.
    # Sequence parallelism sums whole rows.
    wide = tokens * (ffn + 2 * ffn * (family == "te") + 3 * hidden + arch.hidden * (tp > 1))
    if adapted:
        mlp = tokens * (base + 2 * ffn + again) + wide
    # A layer that kept its own has given back the second norm's input by then, and with S² half of attention's output;
    # one hidden state is the gradient that goes past it.
    rest = tokens * max(0, attention - attended - 2 * hidden - query // 2 * (halves == 1))
    # Queries of other ranks: they, their outputs and log-sum-exps are kept; the gradients of both come beside them.
    borrowed = _borrowed(plan)
    guests, grads = borrowed * (2 * query + 4 * arch.heads // tp // width), borrowed * 2 * query
    at_work = {
        FULL: max(tokens * attention + guests + grads, mlp + guests),
        GATE_UP: max(rest + grads, tokens * (3 * hidden) + tile if not adapted else wide + 3 * tokens * ffn),
        HOST: max(rest + grads, wide),
        FP8: max(rest + grads, wide + 2 * tokens * ffn),
        POINTWISE: max(rest + grads, wide),
        NONE: max(rest + grads, wide),
    }
    early = _halo(plan) * width
    tiled = {policy: not adapted and policy in (FULL, GATE_UP) for policy in RecomputePolicy}
    beside = {
        policy: work_bytes(plan.base, arch, tp, of_tile if tiles else tokens, width, tiles)
        # The widest that a product of family te takes in 8 bits: the gradient of gate and up.
        + 2 * ffn * tokens * (plan.fp8_recipe != "none")
        for policy, tiles in tiled.items()
    }
    return LayerMemory(
        kept={
            policy: tokens * size * width + (early + guests * width) * (policy is not FULL)
            for policy, size in kept.items()
        },
        at_work={policy: size * width + early + beside[policy] for policy, size in at_work.items()},
        gate_up=2 * tokens * ffn * width,
    )


def _attends_all(plan: LayerPlan) -> bool:
    """Whether some training step is in full attention."""
    return plan.attention.kind == "full" or plan.ends_in_full


def _borrowed(plan: LayerPlan) -> int:
    """Tokens of other context ranks whose queries a rank attends, of the one with most."""
    if not _attends_all(plan):
        return 0
    return plan.micro_batch * lent_tokens(plan.full_attention, plan.at_once, plan.tp, plan.cp)


def _halo(plan: LayerPlan) -> int:
    """Elements of K and V that a layer gets of other context ranks, of the rank that gets most."""
    arch, tp, cp = plan.arch, plan.tp, plan.cp
    if cp == 1:
        return 0
    # Full attention, in the last steps too, gathers all keys and values.
    if _attends_all(plan):
        return 2 * cp * plan.tokens(plan.at_once) * arch.kv_heads // tp * arch.head_dim
    heads = arch.heads, arch.kv_heads, arch.head_dim
    return plan.micro_batch * halo_elements(heads, plan.attention, plan.at_once, tp, cp)


def peak_of(layer: LayerMemory, policies: Sequence[RecomputePolicy]) -> tuple[int, int]:
    """(bytes all layers keep, bytes more at the peak) of one micro-batch on one stage.

    Args:
        policies: of the stage's layers, in order.
    """
    # Of layers in a row that have one policy, the last one's backward finds most that is kept still.
    runs = [(policy, len(list(run))) for policy, run in groupby(reversed(policies))]
    stored = sum(count * layer.kept[policy] for policy, count in runs)
    # The loss comes while everything is kept; the last layer's backward runs first.
    peak, left = stored + LOGITS, stored
    for policy, count in runs:
        peak = max(peak, left + layer.at_work[policy])
        left -= count * layer.kept[policy]
    return stored, peak - stored + PARKED * layer.gate_up * any(policy is HOST for policy, _ in runs)
