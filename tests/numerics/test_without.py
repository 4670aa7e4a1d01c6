"""Every optimisation can be switched off by its word, and changes no gradient."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from pipeline.config.rope import RopeSettings
from pipeline.config.sections import WITHOUT, LoraConfig
from pipeline.data.loader import Batch
from pipeline.data.packing import IGNORE
from pipeline.model import spec
from pipeline.model.layers import lora_functions, loss, norm
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import mark_trainable
from pipeline.planning.arch import read_arch
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.rope import plan_rope
from tests.numerics.movement import tensor_errors
from tests.support.single import single_groups
from tests.support.tiny_models import make_tiny


def test_each_word_switches_one_off_and_gradients_stay(tmp_path: Path) -> None:
    assert set(spec.WITHOUT) == set(WITHOUT)
    arch = read_arch(make_tiny(tmp_path, "tinyllama", num_hidden_layers=2))
    tokens = torch.randint(0, arch.vocab, (1, 48), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, :20] = IGNORE
    adapters = LoraConfig(rank=3, targets=("q", "v", "o", "gate", "down"))
    found, joint = {}, {}
    for words in ((), *((word,) for word in WITHOUT), WITHOUT):
        rope = plan_rope(arch, RopeSettings(), 64)
        model = RankModel(arch, rope, adapters, single_groups(), torch.float32, "pointwise", without=words)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.1, generator=generator)
        mark_trainable(model, ("lora", "embed", "norm"))
        layer = model.stages[0].decoder.layers[0]
        assert isinstance(layer.input_layernorm, norm.StreamNorm) is not bool({"stream_norm", "kernels"} & set(words))
        assert layer.self_attention.fused_qkv is not bool({"fused_qkv", "kernels"} & set(words))
        with (
            mock.patch.object(lora_functions.Joint, "forward", side_effect=lora_functions.Joint.forward) as joined,
            mock.patch.object(loss, "_logits", side_effect=loss._logits) as made,
        ):
            model.train().train_step([Batch(tokens, labels, None)], AttentionSpec("s2", 16), 1 / 48)
        joint[words] = joined.call_count
        logits = sum(len(call.args[0]) for call in made.call_args_list)
        assert logits == (48 if "scored_tokens" in words else 28)
        found[words] = {name: p.grad for name, p in model.canonical_parameters() if p.grad is not None}
    # qkv, o, gate and up, down of two layers.
    assert joint == {words: 0 if "joint_adapters" in words else 8 for words in joint}
    assert len(found[()]) > 10
    for words, gradients in found.items():
        errors = tensor_errors(gradients, found[()], None)
        assert max(errors.values()) <= 2e-6, (words, errors)


@pytest.mark.parametrize("recompute", ["full", "gate_up", "pointwise", "none"])
@pytest.mark.parametrize("targets", [("q", "v", "o"), ("gate", "down")])
def test_without_kernels_none_is_asked_for(recompute: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    """Also where a frozen MLP goes in tiles, and where a product and its adapters are one function."""
    arch = read_arch(make_tiny(tmp_path, "tinyllama", num_hidden_layers=2))
    tokens = torch.randint(0, arch.vocab, (1, 48), generator=torch.Generator().manual_seed(0))
    asked = {}
    for words in ((), ("kernels",)):
        lora, rope = LoraConfig(rank=3, targets=targets), plan_rope(arch, RopeSettings(), 64)
        model = RankModel(arch, rope, lora, single_groups(), torch.bfloat16, recompute, without=words)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.1)
        mark_trainable(model, ("lora", "embed", "norm"))
        users = [module for name, module in sys.modules.items() if name.startswith("pipeline.model.")]
        with contextlib.ExitStack() as patches:
            found = [
                patches.enter_context(mock.patch.object(module, "kernels_for", return_value=None))
                for module in users
                if hasattr(module, "kernels_for")
            ]
            spec_of = AttentionSpec("s2", 16, kernels="kernels" not in words)
            model.train().train_step([Batch(tokens, tokens, None)], spec_of, 1 / 48)
        asked[words] = sum(user.call_count for user in found)
    assert asked[()] > 10 and asked[("kernels",)] == 0, asked
