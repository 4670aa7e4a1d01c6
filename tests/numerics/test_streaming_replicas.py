"""Streaming where replicas share the frozen weights' shards: whatever their documents are, they gather in one order."""

from __future__ import annotations

from pathlib import Path

import torch

from parallel.axes.zero3 import FrozenShards, deepspeed_config
from parallel.world.grid import plan_grid
from parallel.world.groups import destroy_groups, make_groups
from parallel.world.rank_env import RankEnv
from pipeline.config.sections import LoraConfig
from pipeline.data.loader import Batch
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import init_adapters, load_base, mark_trainable
from pipeline.planning.arch import read_arch
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.rope import RopePlan
from tests.numerics.movement import tensor_errors
from tests.numerics.test_streaming import step, text
from tests.support.ranks import run_ranks
from tests.support.tiny_models import make_tiny

CHUNK, TOKENS = 48, 144
OWNERS = {
    "documents that end where chunks do": [0] * CHUNK + [1] * CHUNK + [2] * CHUNK,
    "one document": [0] * TOKENS,
}
"""Of the first rank's sequence, whose chunks nobody reads, and of the second one's."""


def _step(rank: int, world: int, folder: str) -> dict[str, float]:
    """How far each gradient of a streamed step on shared shards is from that of a whole one on weights of one's own."""
    groups, arch, kinds = make_groups(plan_grid(world, 1, 1, 1), RankEnv.read()), read_arch(Path(folder)), ("lora",)
    plain, found = text(1, TOKENS), []
    batch = Batch(plain.tokens, plain.labels, torch.tensor(list(OWNERS.values())[rank])[None])
    for stream, shards in (
        (None, None),
        (CHUNK, FrozenShards(groups, False, deepspeed_config(torch.float32, 1, 1, 2))),
    ):
        rope, lora = RopePlan("none", arch.rope_theta, 1.0, None), LoraConfig(rank=3)
        model = RankModel(
            arch, rope, lora, groups, torch.float32, "full", shards=shards, kinds=kinds, stream=stream
        ).train()
        load_base(model, HfCheckpoint(Path(folder)))
        init_adapters(model, 1)
        mark_trainable(model, kinds)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.canonical_parameters():
            if ".lora_B" in name:
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        found.append(step(model, batch, AttentionSpec("s2", 16))[1])
    destroy_groups(keep_world=True)
    return tensor_errors(found[1], found[0], None)


def test_a_rank_whose_chunks_nobody_reads_gathers_weights_with_the_others(tmp_path: Path) -> None:
    make_tiny(tmp_path, "llama3", num_hidden_layers=3, tie_word_embeddings=False)
    for rank, errors in enumerate(run_ranks(_step, len(OWNERS), str(tmp_path))):
        assert len(errors) > 10 and max(errors.values()) < 1e-5, list(OWNERS)[rank]
