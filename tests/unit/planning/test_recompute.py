"""What each layer keeps: one policy a layer, followed by the layer and counted by the memory formula."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parallel.world.grid import plan_grid
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import RECOMPUTE, LoraConfig
from pipeline.config.yaml_file import load_config
from pipeline.data.loader import Batch
from pipeline.model.layers.recomputation import recomputing
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import mark_trainable
from pipeline.planning.activations import layer_memory
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.layer_plan import LayerPlan
from pipeline.planning.recompute import RecomputePolicy, plan_recompute
from pipeline.planning.rope import plan_rope
from tests.support.single import single_groups
from tests.support.tiny_models import make_tiny

FULL, GATE_UP, HOST, FP8, POINTWISE, NONE = RecomputePolicy
CONFIG = Path(__file__).parents[3] / "launch/configs/llama2_7b_32k.yaml"
TOKENS = 64


def test_a_setting_is_a_policy_for_every_layer() -> None:
    named = [plan_recompute(setting, 3) for setting in RECOMPUTE if setting != "auto"]
    assert named == [(FULL,) * 3, (GATE_UP,) * 3, (POINTWISE,) * 3, (NONE,) * 3]
    assert plan_recompute("pointwise", 2, "fp8") == (FP8,) * 2 and plan_recompute("full", 1, "host") == (FULL,)
    with pytest.raises(ValueError, match="half"):
        plan_recompute("half", 3)


def _run(
    arch: LlamaArch, policies: tuple[RecomputePolicy, ...], targets: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], int, list[int]]:
    """Gradients by name; bytes that autograd keeps and parameters do not hold; layers that ran again."""
    lora, rope = LoraConfig(rank=2, targets=targets), plan_rope(arch, RopeSettings(), TOKENS)
    model = RankModel(arch, rope, lora, single_groups(), torch.float32, policies)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
    mark_trainable(model, ("lora", "embed", "norm"))
    again: list[int] = []
    for index, layer in enumerate(model.stages[0].decoder.layers):

        def note(*_: object, index: int = index) -> None:
            if recomputing():
                again.append(index)

        layer.register_forward_pre_hook(note)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not recomputing() and storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, arch.vocab, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train().train_step([Batch(tokens, tokens, None)], AttentionSpec("s2", 16), 1 / TOKENS)
    gradients = {name: p.grad for name, p in model.canonical_parameters() if p.grad is not None}
    return gradients, sum(sizes.values()), again


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama2", ("q", "k", "v", "o")),
        ("llama2", ("q", "o", "up", "down")),
        ("llama2", ("down",)),
        ("qwen3", ("q", "o", "up", "down")),
        ("biased", ("q", "k", "v", "o")),
    ],
)
def test_layers_follow_their_own_policies_and_gradients_stay(
    tmp_path: Path, kind: str, targets: tuple[str, ...]
) -> None:
    """Every mix recomputes the layers it says, gives the gradients of `full`, and keeps what the formula counts."""
    arch = read_arch(make_tiny(tmp_path, kind, num_hidden_layers=3))
    config = load_config(
        CONFIG,
        [
            f"lora.targets=[{','.join(targets)}]",
            "lora.rank=2",
            f"data.sequence={TOKENS}",
            "attention.group_size=16",
            "model.dtype=fp32",
        ],
    )
    counted = layer_memory(replace(LayerPlan.of(config, arch, plan_grid(1, 1, 1, 1)), width=4)).kept
    mixes = {policy.value: (policy,) * 3 for policy in (FULL, GATE_UP, POINTWISE, NONE)}
    mixes |= {"mix": (FULL, GATE_UP, POINTWISE), "other": (NONE, FULL, GATE_UP), "host": (HOST, POINTWISE, HOST)}
    expected, least, _ = _run(arch, mixes["full"], targets)
    assert len(expected) > 5 and all(bool(grad.any()) for grad in expected.values())
    kept = {}
    for label, policies in mixes.items():
        found, kept[label], again = _run(arch, policies, targets)
        assert again == [index for index in (2, 1, 0) if policies[index] is FULL]
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            assert torch.equal(grad, expected[name]), (label, name)
    # What a CPU's norms and tables keep beside it is the same for these three; an adapted MLP that runs again makes its
    # factors' layout again, too.
    wide = kept["pointwise"] - kept["gate_up"]
    assert wide == pytest.approx(3 * (counted[POINTWISE] - counted[GATE_UP]), rel=0.05 if "up" in targets else 1e-9)
    assert kept["none"] - kept["pointwise"] == 3 * (counted[NONE] - counted[POINTWISE])
    assert kept["pointwise"] - kept["host"] == 2 * (counted[POINTWISE] - counted[HOST])
    rounded, eight, _ = _run(arch, (FP8,) * 3, targets)
    assert kept["pointwise"] - eight == 3 * (counted[POINTWISE] - counted[FP8])
    errors = [float((rounded[name] - grad).norm() / grad.norm()) for name, grad in expected.items()]
    assert 1e-4 < max(errors) < 0.1
    assert kept["gate_up"] - least >= 3 * (counted[GATE_UP] - counted[FULL])
    assert least < kept["mix"] < kept["pointwise"] and least < kept["other"] < kept["none"]
