"""Count what one rank computes and sends, from the graph that really runs, against tokens and ranks. Needs no GPU.

docs/BENCHES.md says how to read it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from parallel.errors import ConfigError, LongspanError
from parallel.world.grid import check_model_fits, plan_grid
from parallel.world.groups import destroy_groups, make_groups
from parallel.world.rank_env import RankEnv
from parallel.world.rng import seed_everything
from pipeline.config.paths import user_path
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import POLICIES, LoraConfig
from pipeline.data.loader import Batch
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import mark_trainable
from pipeline.planning.arch import LlamaArch
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.balance import busiest_rank
from pipeline.planning.rope import plan_rope
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from tools.support.bench_rows import append_rows, print_rows
from tools.support.shapes import SIZES, llama2

MODELS = {f"llama2-{size}": size for size in SIZES}
_aten = torch.ops.aten
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACK = _aten._scaled_dot_product_flash_attention_for_cpu_backward


def _pairs(q: torch.Size, k: torch.Size, causal: bool) -> int:
    """(batch, head, query, key) quadruples that attention looks at."""
    queries, keys = q[2], k[2]
    seen = queries * (queries + 1) // 2 if causal else queries * keys
    return q[0] * q[1] * seen


def _forward_operations(q: torch.Size, k: torch.Size, v: torch.Size, *rest: Any, **_: Any) -> int:
    causal = bool(rest[1]) if len(rest) > 1 else False
    # Scores, and the sum of values: a multiplication and an addition each.
    return 4 * q[3] * _pairs(q, k, causal)


def _backward_operations(dout: torch.Size, q: torch.Size, k: torch.Size, *rest: Any, **_: Any) -> int:
    # After v, out and lse: dropout, causal. Scores again, and four products.
    return 10 * q[3] * _pairs(q, k, bool(rest[4]))


class _Sent(TorchDispatchMode):
    """Bytes that this rank hands to process groups, by collective; of a gather its own part, of a sum the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and not func._opname.startswith(("recv", "barrier")):
            # Of (output, input) collectives the input is second.
            given = args[1] if func._opname in ("_allgather_base_", "_reduce_scatter_base_") else args[0]
            tensors = given if isinstance(given, list | tuple) else [given]
            self.bytes[func._opname] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Counted:
    """Of one rank and one sequence, forward and backward."""

    products: int
    """Operations of matrix products."""
    attention: int
    """Operations of attention."""
    sent: int
    """Bytes handed to other ranks."""

    def __sub__(self, other: Counted) -> Counted:
        return Counted(self.products - other.products, self.attention - other.attention, self.sent - other.sent)


def count(arch: LlamaArch, tokens: int, spec: AttentionSpec, tp: int, cp: int, recompute: str) -> Counted:
    """Run a step of the busiest rank of tp x cp on tensors without memory.

    Raises:
        ConfigError: the model does not fit the grid.
    """
    grid = plan_grid(tp * cp, tp, cp, 1)
    check_model_fits(grid, arch.heads, arch.kv_heads, arch.ffn)
    env = RankEnv(rank=busiest_rank(arch, tokens, spec, grid), world_size=tp * cp, local_rank=0)
    groups = make_groups(grid, env, fake=tp * cp > 1)
    seed_everything(0)
    rope = plan_rope(arch, RopeSettings(type="linear"), max(tokens, arch.max_positions))
    mapping = {_ATTENTION: _forward_operations, _ATTENTION_BACK: _backward_operations}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            # Which tokens are scored is not known of tensors without values: all are.
            without = ("scored_tokens",)
            model = RankModel(arch, rope, LoraConfig(), groups, torch.bfloat16, recompute, without=without)
            mark_trainable(model, ("lora", "embed", "norm"))
            words = torch.zeros(1, tokens, dtype=torch.long)
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter, _Sent() as sent:
                model.train().train_step([Batch(words, words, None)], spec, 1.0)
    finally:
        destroy_groups()
    found = counter.get_flop_counts()["Global"]
    attention = sum(found.get(op, 0) for op in (_ATTENTION, _ATTENTION_BACK))
    return Counted(sum(found.values()) - attention, attention, sum(sent.bytes.values()))


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every grid and length."""
    rows: list[dict[str, Any]] = []
    for tp, cp, tokens in itertools.product(args.tp, args.cp, args.tokens):
        spec = AttentionSpec(args.attention, args.group)
        one, two = (
            count(llama2(MODELS[args.model], layers), tokens, spec, tp, cp, args.recompute) for layers in (1, 2)
        )
        layer = two - one
        ends = one - layer
        row: dict[str, Any] = {
            "tp": tp,
            "cp": cp,
            "tokens": tokens,
            "products TFLOP": layer.products / 1e12,
            "attention TFLOP": layer.attention / 1e12,
            "sent MiB": layer.sent / 2**20,
            "ends TFLOP": ends.products / 1e12,
        }
        if rows and rows[-1]["tokens"] != tokens and (rows[-1]["tp"], rows[-1]["cp"]) == (tp, cp):
            row["grows"] = " ".join(
                f"{_exponent(rows[-1], row, name):.2f}" for name in ("products TFLOP", "attention TFLOP", "sent MiB")
            )
        rows.append(row)
    return rows


def _exponent(before: dict[str, Any], after: dict[str, Any], name: str) -> float:
    if not before[name] or not after[name]:
        return 0.0
    return math.log(after[name] / before[name]) / math.log(after["tokens"] / before["tokens"])


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print a table a layer."""
    parser = Parser("tools.bench.scaling", __doc__, "BENCHES.md")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama2-70b", help="shape (default llama2-70b)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << n for n in range(15, 21)], help="of a sequence")
    parser.add_argument("--tp", type=int, nargs="+", default=[1])
    parser.add_argument("--cp", type=int, nargs="+", default=[8])
    parser.add_argument("--group", type=int, default=8192, help="S² group, tokens (default 8192)")
    parser.add_argument("--attention", choices=("s2", "full"), default="s2")
    parser.add_argument("--recompute", choices=POLICIES, default="none")
    parser.add_argument("--json", type=user_path, help="also append the numbers here, one line a row")
    args = parser.parse_args(arguments)
    try:
        if torch.cuda.is_available():
            raise ConfigError("This counts without a GPU; start it with CUDA_VISIBLE_DEVICES= (empty).")
        rows = rows_of(args)
    except LongspanError as error:
        parser.exit(2, f"{error}\n")
    print_rows(rows, f"{args.model}, {args.attention}, group {args.group}, recompute {args.recompute}: a layer", 140)
    append_rows(args.json, rows, model=args.model, group=args.group)
    return 0


if __name__ == "__main__":
    sys.exit(main())
