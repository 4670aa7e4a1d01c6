"""The stage's logits against transformers on the same weights, fp32, for a tiny model of every supported family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.masking_utils import sliding_window_causal_mask_function

from parallel.errors import ConfigError
from parallel.world.grid import plan_grid
from pipeline.config.rope import RopeSettings
from pipeline.config.sections import LoraConfig
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.model.chunk import LlamaChunk
from pipeline.model.megatron_config import transformer_config
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import init_adapters, load_base
from pipeline.planning.arch import read_arch
from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout
from pipeline.planning.recompute import plan_recompute
from pipeline.planning.rope import hf_rope_fields, plan_rope
from tests.support.single import single_groups
from tests.support.tiny_models import KINDS, make_tiny

FULL = AttentionSpec("full", 2)
CPU = torch.device("cpu")


def stage_of(
    folder: Path,
    settings: RopeSettings | None = None,
    context: int | None = None,
    lora: LoraConfig | None = None,
    base: str = "bf16",
    recompute: str = "none",
    family: str = "local",
) -> LlamaChunk:
    arch = read_arch(folder)
    rope = plan_rope(arch, settings or RopeSettings(), context or arch.max_positions)
    config = transformer_config(arch, plan_grid(1, 1, 1, 1), torch.float32, CPU)
    policies = plan_recompute(recompute, arch.layers)
    groups = single_groups().collection
    adapters = lora or LoraConfig(rank=0)
    stage = LlamaChunk(arch, rope, adapters, config, groups, recompute=policies, family=family, base=base)
    load_base(stage, HfCheckpoint(folder))
    init_adapters(stage, 0)
    return stage.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind: str, tmp_path: Path) -> None:
    make_tiny(tmp_path / kind, kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32).eval()
    stage = stage_of(tmp_path / kind)
    tokens = torch.randint(0, stage.arch.vocab, (2, 37), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
    found = stage.logits(tokens, SequenceLayout.dense(2, 37), FULL)
    assert (found - expected).abs().max() <= 1e-4
    assert expected.abs().max() > 1e-2, "a model of zeros would pass"


@pytest.mark.parametrize("pad_left", [True, False])
def test_padded_logits_equal_transformers(pad_left: bool, tmp_path: Path) -> None:
    make_tiny(tmp_path, "llama2")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    stage = stage_of(tmp_path)
    tokens = torch.randint(0, stage.arch.vocab, (2, 19), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[1, : 7 if pad_left else 0] = False
    mask[1, 19 if pad_left else 12 :] = False
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask.long()).logits
    found = stage.logits(tokens, SequenceLayout.build(2, 19, padding_mask_BS=mask.numpy()), FULL)
    assert (found - expected)[mask].abs().max() <= 1e-4


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "linear"},
        {"type": "yarn"},
        {"type": "ntk"},
        {"type": "abf", "theta": 5e5},
        {"type": "llama3"},
    ],
)
def test_stretched_logits_equal_transformers(rope: dict, tmp_path: Path) -> None:
    """The stretched model equals transformers reading the rope fields we would export."""
    make_tiny(tmp_path, "llama2")
    arch = read_arch(tmp_path)
    context = 4 * arch.max_positions
    stage = stage_of(tmp_path, RopeSettings(**rope), context)
    described = json.loads((tmp_path / "config.json").read_text()) | hf_rope_fields(stage.rope, arch, context)
    (tmp_path / "config.json").write_text(json.dumps(described))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(0, arch.vocab, (1, 200), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(tokens).logits
    found = stage.logits(tokens, SequenceLayout.dense(1, 200), FULL)
    assert (found - expected).abs().max() <= 1e-4


def test_token_nll_is_the_logits_nll(tmp_path: Path) -> None:
    make_tiny(tmp_path, "smollm2")
    stage = stage_of(tmp_path)
    model = RankModel(stage.arch, stage.rope, LoraConfig(rank=0), single_groups(), torch.float32, "none")
    load_base(model, HfCheckpoint(tmp_path))
    tokens = torch.randint(0, stage.arch.vocab, (2, 33), generator=torch.Generator().manual_seed(3))
    logits = stage.logits(tokens, SequenceLayout.dense(2, 33), FULL)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    assert torch.allclose(model.token_nll(tokens, FULL), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "key"), [("mistral", {}), ("qwen3", {"use_sliding_window": True, "max_window_layers": 0})]
)
def test_a_sliding_window_is_transformers(kind: str, key: dict, tmp_path: Path) -> None:
    make_tiny(tmp_path, kind, sliding_window=16, **key)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    stage = stage_of(tmp_path)
    tokens = torch.randint(0, stage.arch.vocab, (2, 53), generator=torch.Generator().manual_seed(4))
    for length in (16, 17, 53):
        with torch.no_grad():
            expected = theirs(tokens[:, :length]).logits
        found = stage.logits(tokens[:, :length], SequenceLayout.dense(2, length), FULL)
        assert (found - expected).abs().max() <= 1e-4, length
    config = json.loads((tmp_path / "config.json").read_text()) | {"sliding_window": None, "use_sliding_window": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    full = stage_of(tmp_path).logits(tokens, SequenceLayout.dense(2, 53), FULL)
    assert (full - expected)[:, :16].abs().max() <= 1e-4 < 1e-2 < (full - expected)[:, 16:].abs().max()


def test_a_window_of_some_layers_is_not_left(tmp_path: Path) -> None:
    make_tiny(tmp_path, "qwen3", sliding_window=16, max_window_layers=1, use_sliding_window=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    stage = stage_of(tmp_path)
    tokens = torch.randint(0, stage.arch.vocab, (1, 17), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        short = theirs(tokens[:, :16]).logits
    assert (stage.logits(tokens[:, :16], SequenceLayout.dense(1, 16), FULL) - short).abs().max() <= 1e-4
    with pytest.raises(ConfigError, match="over 17 tokens sees further than the model's sliding_window of 16"):
        stage.logits(tokens, SequenceLayout.dense(1, 17), FULL)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("window", [16, 15])
def test_groups_of_a_windows_length_lie_inside_it(window: int, shifted: bool) -> None:
    """Of S2 with groups of 16 a window of transformers' takes nothing away; one token less takes some."""
    at = torch.arange(64)
    group = (at + 8 * shifted) // 16
    sparse = (at[:, None] >= at) & (group[:, None] == group)
    rule = sliding_window_causal_mask_function(window)
    inside = torch.tensor([[bool(rule(0, 0, query, key)) for key in at] for query in at])
    assert torch.equal(sparse & inside, sparse) is (window == 16)
