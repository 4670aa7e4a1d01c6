"""Adapters against PEFT on the same weights: loss, every adapter gradient, embedding and norm gradients, fp32."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.sections import LoraConfig
from pipeline.data.packing import IGNORE
from pipeline.model.chunk import LlamaChunk
from pipeline.model.weights.load import mark_trainable, trainable
from pipeline.planning.attention_layout import SequenceLayout
from tests.numerics.test_model_parity import FULL, stage_of
from tests.support.tiny_models import make_tiny

EVERY = ("q", "k", "v", "o", "gate", "up", "down")


def randomize_b(stage: LlamaChunk) -> None:
    """B starts at zero, where A has no gradient: give it values."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def peft_twin(folder: Path, stage: LlamaChunk, lora: LoraConfig) -> torch.nn.Module:
    """transformers + PEFT with the stage's adapters, embedding and norms trainable."""
    return with_adapters(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), stage, lora)


def with_adapters(base: torch.nn.Module, stage: LlamaChunk, lora: LoraConfig) -> torch.nn.Module:
    """PEFT's model of `base` with the stage's adapters; they, embedding and norms train."""
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        target_modules=[f"{target}_proj" for target in lora.targets],
    )
    twin = peft.get_peft_model(base, settings)
    theirs = dict(twin.named_parameters())
    with torch.no_grad():
        for name, kind, parameter in trainable(stage):
            if kind == "lora":
                theirs[peft_name(name)].copy_(parameter)
    for name, parameter in theirs.items():
        if parameter.is_floating_point():  # not so codes of 4 bits
            parameter.requires_grad_("lora" in name or "embed" in name or "norm" in name)
    return twin


def peft_name(name: str) -> str:
    """The name PEFT gives a canonical parameter."""
    return "base_model.model." + name.replace(".lora_A.weight", ".lora_A.default.weight").replace(
        ".lora_B.weight", ".lora_B.default.weight"
    )


@pytest.mark.parametrize("kind", ["llama2", "smollm2"])
@pytest.mark.parametrize(
    ("targets", "rslora"), [(("q", "k", "v", "o"), False), (EVERY, True), (("q", "v"), False), (("k", "up"), False)]
)
def test_loss_and_gradients_equal_peft(kind: str, targets: tuple[str, ...], rslora: bool, tmp_path: Path) -> None:
    make_tiny(tmp_path, kind)
    lora = LoraConfig(rank=4, alpha=16, targets=targets, rslora=rslora)
    stage = stage_of(tmp_path, lora=lora).train()
    randomize_b(stage)
    mark_trainable(stage, ("lora", "embed", "norm"))
    twin = peft_twin(tmp_path, stage, lora)
    tokens = torch.randint(0, stage.arch.vocab, (2, 41), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), IGNORE)], dim=1)

    found = stage.loss_of(stage(tokens, SequenceLayout.dense(2, 41), FULL), labels)
    found.backward()
    expected = twin(tokens, labels=tokens).loss * (labels != IGNORE).sum()
    expected.backward()

    assert abs(found.item() - expected.item()) <= 1e-5 * abs(expected.item())
    theirs = dict(twin.named_parameters())
    seen = 0
    for name, kind_, parameter in trainable(stage):
        twin_grad = theirs[peft_name(name)].grad
        assert twin_grad is not None and parameter.grad is not None
        assert twin_grad.abs().max() > 0, name
        difference = (parameter.grad - twin_grad).norm() / twin_grad.norm()
        assert difference <= 1e-5, (name, kind_, difference)
        seen += 1
    assert seen == len([p for p in theirs.values() if p.requires_grad])


def test_frozen_weights_get_no_gradient_and_step_zero_is_the_base(tmp_path: Path) -> None:
    make_tiny(tmp_path, "llama2")
    plain = stage_of(tmp_path)
    stage = stage_of(tmp_path, lora=LoraConfig(rank=4, targets=EVERY)).train()
    mark_trainable(stage, ("lora", "norm"))
    tokens = torch.randint(0, stage.arch.vocab, (1, 23), generator=torch.Generator().manual_seed(0))
    layout = SequenceLayout.dense(1, 23)
    assert torch.equal(stage.eval().logits(tokens, layout, FULL), plain.logits(tokens, layout, FULL))
    stage.loss_of(stage.train()(tokens, layout, FULL), tokens).backward()
    for name, parameter in stage.named_parameters():
        trains = ".adapters." in name or "layernorm" in name
        assert (parameter.grad is not None) == trains, name


def test_dropout_is_scaled_and_off_in_evaluation(tmp_path: Path) -> None:
    make_tiny(tmp_path, "llama2")
    stage = stage_of(tmp_path, lora=LoraConfig(rank=4, dropout=0.5))
    randomize_b(stage)
    adapters = stage.decoder.layers[0].self_attention.linear_proj.adapters
    x = torch.ones(400, 1, adapters.o.lora_A.shape[1])
    base = torch.zeros(400, 1, adapters.o.lora_B.shape[0])
    quiet = adapters.eval()(x, base)
    torch.manual_seed(0)
    noisy = adapters.train()(x, base)
    assert not torch.equal(noisy[0], noisy[1])
    assert torch.allclose(noisy.mean(0), quiet.mean(0), atol=0.15 * quiet.abs().max().item())
