"""A base in 8 or 4 bits: trained as transformers and PEFT train its dequantized weights, and alike on every grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from parallel.errors import ConfigError
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import LoraConfig
from pipeline.data.packing import IGNORE
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.model.chunk import LlamaChunk
from pipeline.model.layers.quantized_weight import FORMS, dequantized, empty
from pipeline.model.rank_model import RankModel
from pipeline.model.spec import FAMILIES, in_form
from pipeline.model.weights.load import mark_trainable, trainable
from pipeline.planning.arch import read_arch
from pipeline.planning.attention_layout import SequenceLayout
from pipeline.planning.rope import plan_rope
from tests.numerics.test_lora_parity import EVERY, peft_name, peft_twin, randomize_b, with_adapters
from tests.numerics.test_model_parity import FULL, stage_of
from tests.numerics.test_parallel_parity import (
    CP2,
    OFFLOAD,
    PP2,
    TP2,
    Grid,
    _observe,
    observe_alone,
    of_grid,
    write_config,
)
from tests.support.ranks import run_ranks
from tests.support.single import single_groups
from tests.support.tiny_models import make_tiny
from tools.support.parity import Observed, compare

STEPS = 1
SIZES = {"hidden_size": 128, "intermediate_size": 192}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def oracle(folder: Path, form: str, stage: LlamaChunk, lora: LoraConfig) -> torch.nn.Module:
    """transformers and PEFT on the weights of the layers' linears as they are rounded."""
    twin = peft_twin(folder, stage, lora)
    stored = HfCheckpoint(folder)
    changed = 0
    with torch.no_grad():
        for name, module in twin.named_modules():
            place = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            if isinstance(module, torch.nn.Linear) and place.split(".")[-1] in PROJECTIONS:
                module.weight.copy_(dequantized(form, stored.tensor(f"{place}.weight")))
                changed += 1
    assert changed == 7 * stage.arch.layers
    return twin


def adapted(folder: Path, lora: LoraConfig, form: str = "nf4", recompute: str = "none") -> LlamaChunk:
    """The model with adapters that do something."""
    stage = stage_of(folder, lora=lora, base=form, recompute=recompute).train()
    randomize_b(stage)
    mark_trainable(stage, ("lora", "embed", "norm"))
    return stage


def errors(
    folder: Path, form: str, lora: LoraConfig, recompute: str, twin: torch.nn.Module | None = None
) -> tuple[float, dict[str, float]]:
    """Relative differences from `twin`, or from the oracle: of the loss, and of every gradient."""
    stage = adapted(folder, lora, form, recompute)
    twin = twin or oracle(folder, form, stage, lora)
    tokens = torch.randint(0, stage.arch.vocab, (2, 41), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), IGNORE)], dim=1)
    found = stage.loss_of(stage(tokens, SequenceLayout.dense(2, 41), FULL), labels)
    found.backward()
    expected = twin(tokens, labels=tokens).loss * (labels != IGNORE).sum()
    expected.backward()
    theirs, gradients = dict(twin.named_parameters()), {}
    for name, _, parameter in trainable(stage):
        wanted = theirs[peft_name(name)].grad
        assert wanted is not None and parameter.grad is not None and wanted.abs().max() > 0
        gradients[name] = float((parameter.grad - wanted).norm() / wanted.norm())
    return abs(found.item() - expected.item()) / abs(expected.item()), gradients


@pytest.mark.parametrize("recompute", ["none", "full", "gate_up", "pointwise"])
@pytest.mark.parametrize("targets", [EVERY, ("q", "v")], ids=["adapters everywhere", "frozen MLP"])
def test_nf4_trains_as_peft_on_the_rounded_weights(targets: tuple[str, ...], recompute: str, tmp_path: Path) -> None:
    make_tiny(tmp_path, "llama3", **SIZES)
    loss, gradients = errors(tmp_path, "nf4", LoraConfig(rank=4, alpha=16, targets=targets), recompute)
    assert loss <= 1e-5 and max(gradients.values()) <= 1e-5, (loss, gradients)


def bitsandbytes_twin(folder: Path, stage: LlamaChunk, lora: LoraConfig) -> torch.nn.Module:
    """transformers and PEFT on a base that bitsandbytes keeps in 4 bits, as QLoRA's users train it."""
    form = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=form, dtype=torch.float32, device_map={"": "cpu"}
    )
    assert type(base.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    return with_adapters(base, stage, lora)


@pytest.mark.parametrize("targets", [EVERY, ("q", "v")], ids=["adapters everywhere", "frozen MLP"])
def test_nf4_trains_as_bitsandbytes_and_peft(targets: tuple[str, ...], tmp_path: Path) -> None:
    """bitsandbytes rounds the second level's scales over the whole matrix, and here each row's are its own: weights are
    0.2% apart, where rounding to 4 bits moves them by 9%."""
    make_tiny(tmp_path, "llama3", **SIZES)
    lora = LoraConfig(rank=4, alpha=16, targets=targets)
    loss, gradients = errors(tmp_path, "nf4", lora, "none", bitsandbytes_twin(tmp_path, adapted(tmp_path, lora), lora))
    assert loss <= 2e-4 and max(gradients.values()) <= 0.02, (loss, gradients)
    plain, apart = errors(tmp_path, "nf4", lora, "none", peft_twin(tmp_path, adapted(tmp_path, lora), lora))
    assert plain > 8e-4 and max(apart.values()) > 0.1, "the base as it is stored is farther"


def test_the_oracle_is_not_the_stored_model(tmp_path: Path) -> None:
    """Rounding to 4 and to 8 bits moves the loss, or the comparisons would hold for any base."""
    make_tiny(tmp_path, "llama3", **SIZES)
    tokens = torch.randint(0, 128, (1, 41), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = theirs(tokens, labels=tokens).loss.item()
    for form, least in (("nf4", 1e-3), ("fp8", 1e-4)):
        stage = stage_of(tmp_path, base=form)
        labels = torch.cat([tokens[:, 1:], torch.full((1, 1), IGNORE)], dim=1)
        found = stage.loss_of(stage(tokens, SequenceLayout.dense(1, 41), FULL), labels).item() / 40
        assert abs(found - expected) > least * expected, form


@pytest.mark.parametrize(
    ("targets", "recompute"), [(EVERY, "gate_up"), (("q", "k", "v", "o"), "pointwise"), (("q", "k", "v", "o"), "full")]
)
def test_fp8_trains_near_peft_on_the_dequantized_weights(
    tmp_path: Path, targets: tuple[str, ...], recompute: str
) -> None:
    """Apart by what activations and gradients are rounded by, too: 3% of a product, unbiased."""
    make_tiny(tmp_path, "llama3", **SIZES)
    loss, gradients = errors(tmp_path, "fp8", LoraConfig(rank=4, alpha=16, targets=targets), recompute)
    print(loss, max(gradients.values()))
    assert loss <= 5e-3 and max(gradients.values()) <= 0.15


def test_megatrons_own_linears_cannot_keep_it() -> None:
    with pytest.raises(ConfigError, match=r"model\.base: nf4 needs our own linears; set model\.family: local"):
        in_form(FAMILIES["megatron"], "nf4")


@pytest.mark.parametrize("form", ["fp8", "nf4"])
def test_train_without_kernels_reaches_the_matrices(form: str, tmp_path: Path) -> None:
    arch = read_arch(make_tiny(tmp_path, "llama3", **SIZES))
    rope = plan_rope(arch, RopeSettings(), arch.max_positions)
    for without in ((), ("kernels",)):
        lora, groups = LoraConfig(rank=0), single_groups()
        model = RankModel(arch, rope, lora, groups, torch.float32, "none", without=without, base=form)
        kept = [matrix for _, matrix in model.frozen_matrices()]
        assert len(kept) == 4 * arch.layers
        assert {matrix.fused for matrix in kept if isinstance(matrix, FORMS[form])} == {not without}


@pytest.mark.parametrize("form", ["fp8", "nf4"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_share_of_the_columns_is_rounded_as_in_the_whole_row(form: str, ranks: int) -> None:
    """264 blocks: the group of the second level ends within a rank's share."""
    width = 64 * 264
    matrix = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    matrix[:, 5] = 9.0
    whole = dequantized(form, matrix)
    for rank in range(ranks):
        first, last = rank * width // ranks, (rank + 1) * width // ranks
        share = empty(form, (3, width), "cpu", (first, last))
        share.write(matrix)
        found = share.dequantized(torch.float32)
        assert torch.equal(found, whole[:, first:last])


NF4_CASES = [
    ("nf4", TP2),
    ("nf4", CP2),
    ("nf4", PP2),
    ("nf4 tiled", TP2),
    ("nf4 tiled", Grid(engine=OFFLOAD)),
]
FP8_CASES = [("fp8", TP2), ("fp8", Grid(engine=OFFLOAD))]


@pytest.mark.slow
@pytest.mark.crowd
def test_every_kind_of_grid_trains_as_one_process(tmp_path: Path) -> None:
    """The weights are the same everywhere. Of FP8 one rounding of an activation that falls the other way changes all
    later ones, and under tensor parallelism a rank scales its share of a row of activations alone."""
    cases = [of_grid(name, grid, 2) for name, grid in (*NF4_CASES, *FP8_CASES)]
    references = observe_alone(tmp_path / "alone", sorted({name for name, _ in cases}), STEPS)
    paths = [str(write_config(tmp_path, name, grid)) for name, grid in cases]
    found = run_ranks(_observe, 2, paths, STEPS, timeout=600)[0]
    for (name, grid), mine in zip(cases, found, strict=True):
        mine.pop("start")
        difference = compare(Observed(**mine), references[name])
        loss, gradient = (1e-5, 1e-5) if "nf4" in name else (2e-3, 0.15)
        assert difference.loss <= loss and difference.gradient <= gradient, (name, grid, difference)
        assert mine["frozen_kept"], (name, grid)
    assert len(references["nf4"].gradients) > 50
