"""Memory that reads use by turns: what lives keeps its numbers, and what does not gives its place away."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.storage import turns
from pipeline.storage.safetensors import TensorFact
from pipeline.storage.turns import Turns

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
FACTS = st.builds(TensorFact, st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from(DTYPES))


@given(st.integers(1, 3), st.lists(st.lists(FACTS, max_size=4), max_size=8))
def test_tensors_live_through_the_turns_that_are_kept(kept: int, asked: list[list[TensorFact]]) -> None:
    memory, alive = Turns(kept), list[list[tuple[torch.Tensor, int]]]()
    for number, facts in enumerate(asked):
        memory.begin()
        alive = alive[-(kept - 1) :] if kept > 1 else []
        mine = []
        for fact in facts:
            mine.append((memory.empty(fact).fill_(number), number))
            assert (tuple(mine[-1][0].shape), mine[-1][0].dtype) == (fact.shape, fact.dtype)
        alive.append(mine)
        assert all(bool((tensor == value).all()) for turn in alive for tensor, value in turn)


def test_a_turn_has_the_memory_of_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fact, memory, places = TensorFact((32, 32), torch.float32), Turns(2), []
    for _ in range(6):
        memory.begin()
        pair = memory.empty(fact), memory.empty(fact)
        places.append(tuple(tensor.data_ptr() for tensor in pair))
    assert places[2] == places[4] and places[3] == places[5] and not set(places[2]) & set(places[3])
    monkeypatch.setattr(turns, "MOST", 5000)  # room for one of the two
    memory = Turns(1)
    for _ in range(3):
        memory.begin()
        memory.empty(fact)
        memory.empty(fact)
    assert len(memory._buffers[0]) == 5000


def test_a_checkpoint_reads_so_until_the_end(tmp_path: Path) -> None:
    stored = {f"w{number}": torch.randn(16, 24) for number in range(6)}
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint, places = HfCheckpoint(tmp_path), set()
    with checkpoint.in_turns(1) as begin:
        for name, tensor in stored.items():
            begin()
            found = checkpoint.slice(name, 1, 3, 9) if name == "w5" else checkpoint.tensor(name)
            assert torch.equal(found, tensor[:, 3:9] if name == "w5" else tensor)
            places.add(found.data_ptr())
    assert len(places) <= 2
    kept = [checkpoint.tensor("w0"), checkpoint.tensor("w1")]
    assert all(torch.equal(found, stored[f"w{number}"]) for number, found in enumerate(kept))
