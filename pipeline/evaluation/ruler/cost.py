"""What RULER takes, told before it is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.world.grid import GridPlan
from pipeline.evaluation.ruler.tasks import RulerCell
from pipeline.planning.arch import LlamaArch
from pipeline.planning.stream import cache_bytes, prefill_cost, rows_together


@dataclass(frozen=True)
class RulerCost:
    """Of all cells together."""

    prompts: int
    tokens: int
    """Of all prompts."""
    reading: float
    """Floating-point operations of all ranks: every prompt in full attention, once."""
    writing: float
    """Likewise, of the answers at most: a forward of a prompt's end for every token that may be written."""
    host: int
    """Bytes of host memory of a rank, at most: keys and values of the prompts that go through together."""

    def sentence(self, step_tokens: int | None = None) -> str:
        """For the user.

        Args:
            step_tokens: tokens of a training step, which it is compared with; None: it is not.
        """
        steps = "" if step_tokens is None else f" (as many as {self.tokens / step_tokens:.1f} training steps have)"
        return (
            f"{self.prompts:,} prompts of {self.tokens:,} tokens{steps} take {self.reading:.1e} floating-point "
            f"operations, and their answers {self.writing:.1e} at most; keys and values take up to "
            f"{self.host / 2**30:.1f} GiB of host memory a rank"
        )


def ruler_cost(cells: Sequence[RulerCell], arch: LlamaArch, grid: GridPlan, width: int) -> RulerCost:
    """Of every prompt of every cell.

    Args:
        width: bytes of an element of keys and values.
    """
    reading = writing = 0.0
    unit = grid.tp * grid.cp
    lengths = [(len(ids), sample.new) for cell in cells for ids, sample in zip(cell.prompts, cell.samples, strict=True)]
    for tokens, new in lengths:
        once = prefill_cost(arch, grid, tokens, -(-tokens // unit) * unit, 1)
        reading += once.attention + once.products
        seen = 4.0 * arch.head_dim * arch.heads * arch.layers * (tokens + new)
        writing += new * new * (once.products / tokens + seen)
    host = 0
    for cell in cells:
        longest, new = max(map(len, cell.prompts)), cell.samples[0].new
        # Beyond its window a model is not computed in chunks, and nothing waits.
        if arch.sliding_window is None or longest + new <= arch.sliding_window:
            rows = rows_together(len(cell.prompts), longest + new)
            host = max(host, cache_bytes(arch, grid, longest, rows, width))
    return RulerCost(len(lengths), sum(tokens for tokens, _ in lengths), reading, writing, host)
