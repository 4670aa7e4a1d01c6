"""Direct loading on real ranks, TP 2 x PP 2 over gloo: transformers' losses, and each rank reads its slices only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from parallel.world.grid import plan_grid
from parallel.world.groups import destroy_groups, make_groups
from parallel.world.rank_env import RankEnv
from parallel.world.rng import seed_everything
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import LoraConfig
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import load_base
from pipeline.planning.arch import read_arch
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.rope import plan_rope
from pipeline.planning.tensors import to_hf, tp_slice
from tests.support.ranks import run_ranks
from tests.support.tiny_models import make_tiny

ADDED = 3
CASES = (("qwen2", 0), ("llama32", 0), ("llama2", ADDED))
LAYERS, TOKENS = 4, 24


def load_and_score(rank: int, world: int, folder: str, tokens: torch.Tensor) -> list[tuple[torch.Tensor, int, int]]:
    """Of every case: losses, bytes read, bytes this rank's slices have."""
    torch.set_num_threads(1)
    results = []
    groups = make_groups(plan_grid(world, 2, 1, 2), RankEnv.read())
    seed_everything(0)
    for kind, added in CASES:
        base = Path(folder) / kind
        stored = read_arch(base)
        arch = replace(stored, vocab=stored.vocab + added)
        rope = plan_rope(arch, RopeSettings(), arch.max_positions)
        part = RankModel(arch, rope, LoraConfig(rank=0), groups, torch.float32, "none")
        checkpoint = HfCheckpoint(base)
        load_base(part, checkpoint)
        expected = 0
        for name, parameter in part.canonical_parameters():
            for source, _ in to_hf(name):
                cut = tp_slice(source, stored, part.tp_rank, 2)
                whole = checkpoint.facts[source].nbytes
                expected += (
                    whole if cut is None else whole * (cut[2] - cut[1]) // checkpoint.facts[source].shape[cut[0]]
                )
            assert parameter.isfinite().all()
        loss = part.eval().token_nll(tokens, AttentionSpec("full", 2, "upper_half", False, "math"))
        results.append((loss, checkpoint.bytes_read, expected))
    destroy_groups()
    return results


def test_ranks_read_their_slices_and_give_transformers_losses(tmp_path: Path) -> None:
    tokens = torch.randint(128, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    for kind, added in CASES:
        make_tiny(tmp_path / kind, kind, num_hidden_layers=LAYERS, vocab_size=131 if not added else 130)
    found = run_ranks(load_and_score, 4, str(tmp_path), tokens, timeout=280.0)
    for index, (kind, added) in enumerate(CASES):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32).eval()
        if added:
            old = {
                name: p.clone() for name, p in theirs.named_parameters() if "embed_tokens" in name or "lm_head" in name
            }
            theirs.resize_token_embeddings(130 + added, mean_resizing=False)
            with torch.no_grad():
                for name, parameter in theirs.named_parameters():
                    if name in old:
                        parameter[130:] = old[name].double().mean(0).float()
        with torch.no_grad():
            logits = theirs(tokens).logits
        wanted = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        size = sum(fact.nbytes for fact in HfCheckpoint(tmp_path / kind).facts.values())
        for loss, read, expected in (result[index] for result in found):
            assert (loss - wanted).abs().max() <= 1e-4
            # A rank with added rows reads the stored ones once more, for their mean.
            assert read == expected if not added else read >= expected
            assert read < 0.75 * size
