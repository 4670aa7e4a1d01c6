"""What each layer keeps: one policy a layer, followed by the layer and counted by the memory formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config.rope import RopeSettings
from pipeline.config.sections import RECOMPUTE, LoraConfig
from pipeline.data.loader import Batch
from pipeline.model.layers.recomputation import recomputing
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import mark_trainable
from pipeline.planning.arch import read_arch
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.recompute import RecomputePolicy, plan_recompute
from pipeline.planning.rope import plan_rope
from tests.support.single import single_groups
from tests.support.tiny_models import make_tiny

FULL, NONE = RecomputePolicy.FULL, RecomputePolicy.NONE


def test_a_setting_is_a_policy_for_every_layer() -> None:
    assert [plan_recompute(setting, 3) for setting in RECOMPUTE] == [(FULL,) * 3, (NONE,) * 3]
    with pytest.raises(ValueError, match="half"):
        plan_recompute("half", 3)


def test_layers_follow_their_own_policies_and_gradients_stay(tmp_path: Path) -> None:
    """A mix recomputes the layers it says and no others, and keeps less than `none` and more than `full`."""
    arch = read_arch(make_tiny(tmp_path, "llama2"))
    tokens = torch.randint(0, arch.vocab, (1, 64), generator=torch.Generator().manual_seed(0))
    mixes = {"none": (NONE, NONE), "mix": (NONE, FULL), "other": (FULL, NONE), "full": (FULL, FULL)}
    found, kept = {}, {}
    for label, policies in mixes.items():
        model = RankModel(
            arch, plan_rope(arch, RopeSettings(), 64), LoraConfig(rank=2), single_groups(), torch.float32, policies
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.1, generator=generator)
        mark_trainable(model, ("lora", "embed", "norm"))
        again: list[int] = []
        for index, layer in enumerate(model.stages[0].decoder.layers):

            def note(*_: object, index: int = index, again: list[int] = again) -> None:
                if recomputing():
                    again.append(index)

            layer.register_forward_pre_hook(note)
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            if not recomputing():
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.train().train_step([Batch(tokens, tokens, None)], AttentionSpec("s2", 16), 1 / 64)
        assert again == [index for index in (1, 0) if policies[index] is FULL]
        found[label] = {name: p.grad for name, p in model.canonical_parameters() if p.grad is not None}
        kept[label] = sum(sizes.values())
    assert len(found["none"]) > 10
    for label in mixes:
        for name, grad in found[label].items():
            # A CPU's small products round by where their operands lie in memory.
            assert (grad - found["none"][name]).norm() <= 2e-6 * grad.norm(), (label, name)
    assert kept["full"] < kept["mix"] < kept["none"] and kept["full"] < kept["other"] < kept["none"]
