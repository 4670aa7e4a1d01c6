"""The files of a tiny run: random weights, a tokenizer of single characters, random tokens prepared as shards."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file

from pipeline.config.run import RunConfig
from pipeline.data.shard_writer import ShardWriter
from pipeline.data.tokenizer import load_tokenizer
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.tensors import hf_tensor_shapes
from tools.support.shrink import TOKENS

LONGEST_DOCUMENT = 50
"""Tokens; shorter than a sequence, so that a sequence packs several."""


def write_files(config: RunConfig, model: dict[str, Any]) -> None:
    """Write the base checkpoint, the tokenizer and the tokens that a tiny `config` names.

    Args:
        model: config.json.
    """
    base = Path(config.model.path)
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(model, indent=2))
    save_file(_weights(read_arch(base)), base / "model.safetensors", metadata={"format": "pt"})
    assert config.data.tokenizer is not None
    file = Path(config.data.tokenizer)
    write_tokenizer(file)
    write_tokens(config)


def write_tokens(config: RunConfig) -> None:
    """Write random documents of the tiny tokenizer, prepared as shards, for every step of `config`."""
    assert config.data.tokenizer is not None
    file = Path(config.data.tokenizer)
    rng = np.random.default_rng(0)
    windows = config.train.global_batch * config.train.steps + 1
    lengths = rng.integers(5, LONGEST_DOCUMENT, 2 * windows * config.sequence // LONGEST_DOCUMENT + 2, dtype=np.int64)
    tokenizer = load_tokenizer(file)
    tokens = rng.integers(3, tokenizer.vocab_size, lengths.sum(), dtype=np.uint32)
    tokens[np.cumsum(lengths) - 1] = tokenizer.eos_id
    (source,) = config.data.sources
    with ShardWriter(Path(source.path), tokenizer) as writer:
        writer.add(tokens, lengths)
        writer.finish((), 0, config.data.text_field)


def _weights(arch: LlamaArch) -> dict[str, torch.Tensor]:
    """Seeded, fp32, scaled so that activations stay near one; norms are not all ones."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in hf_tensor_shapes(arch).items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.1 * values
        elif name.endswith(".bias"):
            values *= 0.1
        elif "embed" not in name:
            values *= shape[-1] ** -0.5
        weights[name] = values
    return weights


def write_tokenizer(file: Path) -> None:
    """Write a sentencepiece model of TOKENS single characters."""
    # sentencepiece loads in a moment; a Hugging Face tokenizer would cost every process seconds of transformers.
    model = io.BytesIO()
    letters = [chr(0x4E00 + number) for number in range(TOKENS - 4)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["".join(letters)] * 4),
        model_writer=model,
        vocab_size=TOKENS,
        model_type="char",
        character_coverage=1.0,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file.write_bytes(model.getvalue())
