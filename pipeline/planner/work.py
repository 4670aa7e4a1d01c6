"""What one rank has to do in a step, counted from shapes: operations of products and attention, bytes of everything.

Nothing here is fitted or in seconds; `clock` turns counts into time. The rank counted is the one with the most
attention, for which the others wait.

Shapes: T tokens of a micro-batch that a tensor-parallel group has, I input and O output width of a product.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from parallel.world.grid import GridPlan
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.balance import attention_work
from pipeline.planning.base_form import PRODUCTS, local_shape, matrix_bytes
from pipeline.planning.layer_plan import LayerPlan
from pipeline.planning.memory import GRADIENT
from pipeline.planning.recompute import RecomputePolicy
from pipeline.planning.run_plan import RunPlan
from pipeline.planning.tensors import PROJECTIONS, ROW_PARALLEL, padded_vocab, projection_shape
from pipeline.planning.tile_size import tile_tokens

FORWARD, BACKWARD = 4, 10
"""Operations of a (query, key) pair a head dimension: two products forward; backward the scores again and four more."""
LOSS_BYTES = 40
"""A logit: written in bf16, and read and written as fp32 for maximum, exponential, sums, gradient, and bf16 again."""


@dataclass(frozen=True)
class Work:
    """Counts of one pass over something."""

    products: float = 0.0
    """Floating-point operations of matrix products."""
    rounded: float = 0.0
    """Floating-point operations of products in 8 bits."""
    operands: float = 0.0
    """Bytes of the products' operands and results."""
    attention: float = 0.0
    """Operations of attention."""
    pointwise: float = 0.0
    """Bytes that everything else reads and writes: norms, RoPE, SwiGLU, sums, adapters."""

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, name) + getattr(other, name) for name in FIELDS))

    def __mul__(self, times: float) -> Work:
        return Work(*(getattr(self, name) * times for name in FIELDS))


FIELDS = ("products", "rounded", "operands", "attention", "pointwise")


@dataclass(frozen=True)
class LayerWork:
    """One layer and micro-batch."""

    forward: Work
    entry: Work
    """Of it, the products of queries, keys and values: before attention."""
    backward: Work
    again: dict[RecomputePolicy, Work]
    """What a policy computes a second time."""
    moved: dict[RecomputePolicy, Work]
    """Of both passes: copies of what FP8's products read and write in tiles of all ranks' tokens."""


def _window(plan: LayerPlan, spec: AttentionSpec) -> int | None:
    """Keys that a query sees at the most, its own among them; None: all before it in its group or sequence.

    Groups of S² lie within a window (`run_plan.check_window`), and full attention keeps to one that all layers have.
    """
    window = plan.arch.sliding_window
    return window if window is not None and spec.kind == "full" and window < plan.sequence else None


def attention_pairs(plan: LayerPlan, rank: int | None = None) -> int:
    """Triples (query head, query, key) of a rank's micro-batch in one layer; None: of the busiest rank."""
    arch = plan.arch
    window = _window(plan, plan.attention)
    if window is not None:
        # A window's queries at a time, masked, and all keys that any of them sees (`attention.local.attend_window`).
        cuts = [(start, min(start + window, plan.sequence)) for start in range(0, plan.sequence, window)]
        computed = sum((stop - start) * (stop - max(0, start - window + 1)) for start, stop in cuts)
        return arch.heads // plan.tp * computed * plan.micro_batch
    found = attention_work(arch, plan.sequence, plan.attention, plan.tp, plan.cp)
    if rank is None:
        return max(max(row) for row in found) * plan.micro_batch
    place = GridPlan(plan.tp, plan.cp, 1, 1).coordinates(rank)
    return found[place.tp][place.cp] * plan.micro_batch


def _product(plan: LayerPlan, parts: Iterable[str], gradient: bool = False) -> Work:
    """One product over all tokens of the tensor-parallel group, forward, or its input gradient; and what a base that is
    not in 16 bits takes beside it."""
    tokens, tp, width, form = plan.tokens(), plan.tp, plan.width, plan.base
    shapes = [local_shape(part, plan.arch, tp) for part in parts]
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    operations, elements = 2.0 * tokens * rows * columns, rows * columns * plan.chunks
    given, made = (rows, columns) if gradient else (columns, rows)
    recipe = plan.fp8_recipe != "none"
    if form == "fp8" or recipe:
        # What is multiplied is read and written rounded; of a gradient the matrix is transposed first. SwiGLU is
        # rounded as it is made, and so is its gradient, but that takes two passes' time: sigmoids, not bytes, bound it.
        # Family te keeps matrices both ways, and rounds SwiGLU by itself.
        made_so = "down" in parts and not gradient and not recipe
        rounding = tokens * given * (1 + width * (-1 if made_so else 1)) + 2 * elements * gradient * (not recipe)
        return Work(0.0, operations, float(tokens * (given + width * made) + elements), pointwise=float(rounding))
    stored = sum(matrix_bytes(form, shape[0], shape[1], shape[2], width) for shape in shapes)
    # NF4: dequantized before each.
    decoded = plan.chunks * stored + width * elements if form == "nf4" else 0
    return Work(operations, 0.0, width * float(tokens * (rows + columns) + elements), pointwise=float(decoded))


def _tiles(plan: LayerPlan, width: int) -> int:
    return -(-plan.tokens(plan.at_once) // tile_tokens(width, plan.tp))


def product_tiles(plan: LayerPlan, parts: Iterable[str]) -> int:
    """Tiles of a frozen product that is made alone (`parallel.axes.tensor.TokenTiles`)."""
    shapes = [local_shape(part, plan.arch, plan.tp) for part in parts]
    # Without tensor parallelism nothing is gathered or summed beside it.
    return 1 if plan.tp == 1 else _tiles(plan, 2 * max(sum(shape[0] for shape in shapes), shapes[0][1]))


def mlp_tiles(plan: LayerPlan) -> int:
    """Tiles of a frozen MLP that makes gate and up again (`layers.mlp`)."""
    return _tiles(plan, 2 * plan.arch.ffn // plan.tp + 2 * plan.arch.hidden)


def _moved(plan: LayerPlan, policy: RecomputePolicy) -> Work:
    """See `LayerWork.moved`: bf16's products read and write tiles where they lie, FP8's do not.

    What a column-parallel product makes and a row-parallel one reads is all ranks' tokens; so are their gradients.
    """
    if plan.base != "fp8" or plan.tp == 1:
        return Work()
    # A frozen MLP that goes tile by tile has no such tensors.
    apart = PRODUCTS[:2] if policy in (RecomputePolicy.FULL, RecomputePolicy.GATE_UP) else PRODUCTS
    values = 0
    for parts in apart:
        shapes = [local_shape(part, plan.arch, plan.tp) for part in parts]
        values += (product_tiles(plan, parts) > 1) * (
            shapes[0][1] if parts[0] in ROW_PARALLEL else sum(s[0] for s in shapes)
        )
    again = 1 + (policy is RecomputePolicy.FULL) / 2
    return Work(pointwise=2.0 * again * 2 * plan.tokens() * values * plan.width)


@cache
def layer_work(plan: LayerPlan, rank: int | None = None) -> LayerWork:
    """Counts of one layer of a rank; None: of the busiest."""
    arch, tp = plan.arch, plan.tp
    hidden, ffn = arch.hidden / tp, arch.ffn / tp
    rotated = (arch.heads + arch.kv_heads) * arch.head_dim / tp
    products = {parts: _product(plan, parts) for parts in PRODUCTS}
    gradients = sum((_product(plan, parts, gradient=True) for parts in PRODUCTS), Work())
    pair = float(attention_pairs(plan, rank)) * arch.head_dim
    ends = [projection_shape(part, arch) for part in plan.targets]
    inputs, outputs = sum(shape[1] for shape in ends) / tp, sum(shape[0] for shape in ends) / tp
    # Two norms (read, write), two residual sums (read twice, write), RoPE (read, write), SwiGLU (read two, write one),
    # adapters (read the input, read and write the output).
    norms, sums = 4 * hidden, 6 * hidden
    # The sum before the second norm is made with it.
    forward = norms + sums - hidden + 2 * rotated + 3 * ffn + inputs + 2 * outputs
    # Norms' gradients (read input and gradient, write) and sums; RoPE; SwiGLU's (read three, write two); adapters'
    # (read the gradient twice and the input once, add to the input's gradient).
    backward = 6 * hidden + sums + 2 * rotated + 5 * ffn + 2 * outputs + 3 * inputs
    scale = float(plan.tokens() * plan.width)
    every = sum(products.values(), Work())
    ahead = every + Work(attention=FORWARD * pair, pointwise=forward * scale)
    back = gradients + Work(attention=BACKWARD * pair, pointwise=backward * scale)
    # down_proj's values leave the layer and are not made again, nor is the sum after it.
    whole = every + products[("down",)] * -1 + Work(attention=FORWARD * pair, pointwise=(forward - 3 * hidden) * scale)
    # Outputs of norms that adapters read; and of the MLP gate and up from its input.
    few = Work(pointwise=norms * scale)
    again = {"full": whole, "gate_up": products[("gate", "up")] + few, "none": Work()}
    policies = {policy: again.get(policy.value, few) for policy in RecomputePolicy}
    return LayerWork(
        ahead, products[PRODUCTS[0]], back, policies, {policy: _moved(plan, policy) for policy in RecomputePolicy}
    )


def _trains_head(plan: LayerPlan) -> bool:
    """Whether the output matrix has a gradient."""
    return "lm_head" in plan.trainable or (plan.arch.tied and "embed" in plan.trainable)


@cache
def loss_work(plan: LayerPlan) -> Work:
    """The output matrix's products, its loss and the embedding, forward and backward, of one micro-batch."""
    arch, tp, tokens, width = plan.arch, plan.tp, plan.tokens(), plan.width
    rows = padded_vocab(arch, tp) // tp
    times = 3 if _trains_head(plan) else 2
    operands = width * float(tokens * (rows + arch.hidden) + rows * arch.hidden)
    one = Work(2.0 * tokens * rows * arch.hidden, operands=operands)
    embedding = tokens * arch.hidden / tp * (2 * width + 2 * GRADIENT)
    return one * times + Work(pointwise=float(LOSS_BYTES * tokens) * rows + embedding)


def useful_operations(plan: RunPlan, full: bool = False) -> float:
    """Floating-point operations of an optimizer step, all ranks together, that its result needs.

    Forward and input gradients of every frozen product, adapters forward and backward, attention's two products forward
    and four backward, the loss. Nothing that is computed again, no padding, and no gradient of a frozen weight.

    Args:
        full: the step is one of the last, in full attention.
    """
    arch, lora = plan.arch, plan.config.lora
    tokens = float(plan.batch.global_batch * plan.sequence)
    matrices = sum(rows * columns for rows, columns in (projection_shape(part, arch) for part in PROJECTIONS))
    ends = sum(sum(projection_shape(part, arch)) for part in plan.layer.targets)
    layer = 4 * matrices + 6 * lora.rank * ends
    spec = plan.full_attention if full else plan.attention
    window, pairs = _window(plan.layer, spec), sum(sum(row) for row in attention_work(arch, plan.sequence, spec, 1, 1))
    if window is not None:
        pairs = arch.heads * (window * (window + 1) // 2 + (plan.sequence - window) * window)
    times = 6 if _trains_head(plan.layer) else 4
    attention = 3.0 * FORWARD * arch.head_dim * plan.batch.global_batch * pairs
    return tokens * (arch.layers * layer + times * arch.vocab * arch.hidden) + arch.layers * attention


def trained_elements(plan: RunPlan) -> int:
    """Trained elements that a rank's tensor-parallel slice has."""
    return plan.counts.trained // plan.grid.tp
