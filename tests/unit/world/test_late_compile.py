"""What megatron-core would compile at its import is compiled when it is called; most never is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from parallel.world.late_compile import compile_late, late

STARTS = """
import sys
import pipeline.train, pipeline.training.session, pipeline.build
from megatron.core.jit import jit_fuser
import torch
assert jit_fuser is not torch.compile
assert "torch._dynamo" not in sys.modules
"""


def test_a_training_starts_without_the_compiler() -> None:
    command = [sys.executable, "-W", "ignore", "-c", STARTS]
    subprocess.run(command, cwd=Path(__file__).parents[3], check=True, timeout=240)


def test_a_function_is_compiled_at_its_first_call_and_once() -> None:
    from torch._dynamo.testing import CompileCounter

    counter, eager = CompileCounter(), torch.compile
    with late():

        @torch.compile(backend=counter, dynamic=False)
        def twice(x: torch.Tensor) -> torch.Tensor:
            """Doubles."""
            return x * 2

    assert torch.compile is eager and counter.frame_count == 0
    assert (twice.__name__, twice.__doc__) == ("twice", "Doubles.")
    for _ in range(2):
        assert twice(torch.tensor([1.5])).tolist() == [3.0]
    assert counter.frame_count == 1


def test_without_options_it_is_compiled_too() -> None:
    def asks(x: torch.Tensor) -> torch.Tensor:
        return x + torch.compiler.is_compiling()

    assert asks(torch.zeros(1)).tolist() == [0.0]
    assert compile_late(asks, backend="eager")(torch.zeros(1)).tolist() == [1.0]
