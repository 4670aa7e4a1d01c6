"""Under tensor parallelism no tensor of a training step holds a hidden state, or an MLP row, of every token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.world.grid import plan_grid
from parallel.world.groups import make_groups
from parallel.world.rank_env import RankEnv
from parallel.world.rng import seed_everything
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import LoraConfig
from pipeline.data.loader import Batch
from pipeline.model.layers import loss
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import mark_trainable
from pipeline.planning import tile_size
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.rope import plan_rope
from tools.support.shapes import llama2

TOKENS, HIDDEN, RANKS = 512, 64, 8


class _Largest(TorchDispatchMode):
    """Elements of the largest storage that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.made_by = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                elements = leaf.untyped_storage().nbytes() // leaf.element_size()
                if elements > self.elements:
                    self.elements, self.made_by = elements, str(func)
        return result


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "one tile"])
def test_no_tensor_holds_every_tokens_hidden_state(monkeypatch: pytest.MonkeyPatch, tiled: bool) -> None:
    """With one tile for all tokens the check sees what it looks for."""
    if tiled:
        monkeypatch.setattr(tile_size, "LEAST_TOKENS", 64)
        monkeypatch.setattr(tile_size, "TILE_ELEMENTS", 1)
        monkeypatch.setattr(loss, "LEAST_TOKENS", 64)
        monkeypatch.setattr(loss, "CHUNK_LOGITS", 1)
    arch = replace(llama2("70b", 2), hidden=HIDDEN, ffn=16 * HIDDEN, heads=16, kv_heads=8, head_dim=4, vocab=128)
    env = RankEnv(rank=0, world_size=RANKS, local_rank=0)
    groups = make_groups(plan_grid(RANKS, RANKS, 1, 1), env, fake=True)
    seed_everything(0)
    rope = plan_rope(arch, RopeSettings(), TOKENS)
    model = RankModel(arch, rope, LoraConfig(rank=2), groups, torch.float32, "full").train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    mark_trainable(model, ("lora", "norm"))
    tokens = torch.randint(0, arch.vocab, (1, TOKENS))
    with _Largest() as largest:
        model.train_step([Batch(tokens, tokens, None)], AttentionSpec("s2", TOKENS // 4), 1 / TOKENS)
    # The embedding's rows are still made for every token.
    whole = TOKENS * HIDDEN
    if tiled:
        assert largest.elements <= whole, (largest.elements / whole, largest.made_by)
    else:
        assert largest.elements > whole, (largest.elements / whole, largest.made_by)
