"""Time the two products of a frozen matrix in every form, with their error and the memory beside them.

docs/BENCHES.md says how to read it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from pipeline.model.layers.frozen_weight import DenseWeight, FrozenWeight
from pipeline.model.layers.quantized_weight import empty
from pipeline.planning.memory import GIB
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser

FORMS = ("dense", "fp8", "nf4")


def measure(work: Callable[[], torch.Tensor], repeats: int) -> tuple[float, float]:
    """Median milliseconds and, on a GPU, GiB at the peak above what was there before, the result left out."""
    on_gpu = work().is_cuda
    times = []
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        found = work()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
        size = found.nbytes
        del found
    peak = torch.cuda.max_memory_allocated() - before - size if on_gpu else 0
    return statistics.median(times), peak / GIB


def made(form: str, matrix: torch.Tensor) -> FrozenWeight:
    """The matrix in one form."""
    if form == DenseWeight.form:
        return DenseWeight(torch.nn.Parameter(matrix, requires_grad=False))
    weight = empty(form, (matrix.shape[0], matrix.shape[1]), matrix.device)
    weight.write(matrix)
    return weight


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = Parser("tools.bench.products", __doc__, "BENCHES.md")
    parser.add_argument("--rows", type=int, default=57344, help="output width")
    parser.add_argument("--columns", type=int, default=8192, help="input width")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    matrix = torch.randn(options.rows, options.columns, device=device, dtype=torch.bfloat16)
    inputs = torch.randn(options.tokens, options.columns, device=device, dtype=torch.bfloat16)
    grads = torch.randn(options.tokens, options.rows, device=device, dtype=torch.bfloat16)
    flops = 2 * options.rows * options.columns * options.tokens
    right: dict[str, torch.Tensor] = {}
    for form in FORMS:
        weight = made(form, matrix)
        stored = sum(member.nbytes for member in weight.members().values())
        for name, work, given in (("product", weight.product, inputs), ("grad_input", weight.grad_input, grads)):
            found = work(given)
            reference = right.setdefault(name, found)
            error = float((found.float() - reference.float()).norm() / reference.float().norm())
            del found
            took, beside = measure(lambda work=work, given=given: work(given), options.repeats)  # type: ignore[misc]
            print(
                f"{form:5}  {name:10}  {took:8.2f} ms  {flops / took / 1e9:6.0f} TFLOP/s  error {error:.4f}  "
                f"stored {stored / GIB:.3f} GiB  beside {beside:.3f} GiB"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
