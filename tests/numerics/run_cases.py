"""The runs that `run_oracle` computes too: their YAML and files, and the command's own function run on them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import parallel.world.groups
from parallel.world.rank_env import RankEnv
from pipeline.config.yaml_file import load_config
from pipeline.train import train
from tests.support.tiny_models import make_tiny, write_tokenizer

YAML = """
model: {{path: {base}, context: 128, dtype: {dtype}, rope: {{type: linear, factor: 2}}}}
attention: {{kind: s2, {group}, shifted_heads: {shifted}, full_last_steps: {full_last}}}
lora: {{rank: 4, alpha: 6, dropout: {dropout}, targets: [{targets}]}}
data: {{path: {text}, sequence: {sequence}, mask_documents: {masked}}}
train: {{steps: {steps}, global_batch: 4, micro_batch: {micro}, lr: 1.0e-2, lr_embed_norm: 2.0e-3, betas: [0.8, 0.9],
  eps: 3.0e-3, weight_decay: 0.5, schedule: {schedule}, warmup_steps: 2, min_lr_ratio: 0.2, clip: {clip},
  trainable: [lora, embed, norm, lm_head], recompute: {recompute}, stream: {stream}, seed: 7}}
eval: {{path: {held_out}, lengths: [50, 64], windows: 3, stride: {stride}, prefill: {prefill}}}
parallel: {{tp: {tp}, cp: {cp}, pp: {pp}, engine: {engine}}}
output: {output}
"""
MODELS: dict[str, dict[str, Any]] = {
    # A vocabulary that tensor ranks pad.
    "llama": {"kind": "llama2", "num_key_value_heads": 2, "vocab_size": 131},
    "qwen2": {"kind": "qwen2"},
    "mistral": {"kind": "mistral"},
    # Whole blocks of 64 columns.
    "blocks": {"kind": "llama2", "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 131},
    # Norms of heads, whose width is not the hidden one's share.
    "qwen3": {"kind": "qwen3"},
    # A window that S2's groups fill, and full attention keeps to.
    "windowed": {"kind": "mistral", "sliding_window": 16},
    # Biases on every projection, of which none trains.
    "biased": {"kind": "llama3", "attention_bias": True, "mlp_bias": True, "rope_scaling": None},
}
LAYERS = 2


def write_case(folder: Path, name: str, model: str = "llama", **over: Any) -> Path:
    """The YAML of a run, whose base, text and tokenizer are made if they are not there."""
    settings = {
        "dtype": "fp32",
        "shifted": "upper_half",
        "steps": 5,
        "dropout": 0.0,
        "targets": "q, k, v, o, gate, up, down",
        "sequence": 61,
        "masked": "true",
        "micro": 1,
        "schedule": "cosine",
        "clip": 1.35,  # some steps are clipped
        "recompute": "full",
        "group": "group_fraction: 0.5",
        "full_last": 2,
        "stream": "null",
        "stride": 24,
        "prefill": "null",
        "tp": 1,
        "cp": 1,
        "pp": 1,
        "engine": "megatron",
    } | over
    base = folder / f"{model}-{settings['dtype']}"
    if not base.exists():
        kind = dict(MODELS[model])
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["dtype"]]
        make_tiny(base, kind.pop("kind"), dtype=dtype, **kind)
        write_tokenizer(base)
    for number, part in enumerate(("text", "held-out")):
        if not (folder / part).exists():
            (folder / part).mkdir()
            rng = np.random.default_rng(number)
            for file in range(4):  # to be read in order; one a document would take longer to find than to train on
                texts = [rng.integers(97, 105, rng.integers(10, 60)).astype(np.uint8).tobytes() for _ in range(10)]
                lines = [json.dumps({"text": text.decode()}) + "\n" for text in texts]
                (folder / part / f"{file}.jsonl").write_text("".join(lines))
    path = folder / f"{name}.yaml"
    files = {"base": base, "text": folder / "text", "held_out": folder / "held-out", "output": folder / name}
    path.write_text(YAML.format(**files, **settings))
    return path


def train_named(path: Path, env: RankEnv, overrides: tuple[str, ...] = ()) -> None:
    """As `train_here`; what fails says which case it is, of many that one set of ranks trains."""
    try:
        train_here(path, env, overrides)
    except BaseException as error:
        raise AssertionError(path.stem) from error


def train_here(path: Path, env: RankEnv | None = None, overrides: tuple[str, ...] = ()) -> None:
    """What `python -m pipeline.train` does, in this process, which may go on with another grid after it."""
    env = env or RankEnv()
    if not env.launched:
        train(load_config(path, list(overrides)), env)
        return
    with mock.patch.object(
        parallel.world.groups, "destroy_groups", partial(parallel.world.groups.destroy_groups, True)
    ):
        train(load_config(path, list(overrides)), env)
