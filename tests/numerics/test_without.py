"""Every optimisation can be switched off by its word, and changes no gradient."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch

from pipeline.config.rope import RopeSettings
from pipeline.config.sections import WITHOUT, LoraConfig
from pipeline.data.loader import Batch
from pipeline.model import spec
from pipeline.model.layers import lora_functions, norm
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import mark_trainable
from pipeline.planning.arch import read_arch
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.rope import plan_rope
from tests.support.single import single_groups
from tests.support.tiny_models import make_tiny


def test_each_word_switches_one_off_and_gradients_stay(tmp_path: Path) -> None:
    assert set(spec.WITHOUT) == set(WITHOUT)
    arch = read_arch(make_tiny(tmp_path, "tinyllama", num_hidden_layers=2))
    tokens = torch.randint(0, arch.vocab, (1, 48), generator=torch.Generator().manual_seed(0))
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
        with mock.patch.object(lora_functions.Joint, "forward", side_effect=lora_functions.Joint.forward) as joined:
            model.train().train_step([Batch(tokens, tokens, None)], AttentionSpec("s2", 16), 1 / 48)
        joint[words] = joined.call_count
        found[words] = {name: p.grad for name, p in model.canonical_parameters() if p.grad is not None}
    # qkv, o, gate and up, down of two layers.
    assert joint == {words: 0 if "joint_adapters" in words else 8 for words in joint}
    assert len(found[()]) > 10
    for words, gradients in found.items():
        for name, gradient in gradients.items():
            expected = found[()][name]
            assert float((gradient - expected).norm()) <= 2e-6 * float(expected.norm()), (words, name)
