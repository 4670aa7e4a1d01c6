"""Models that keep q, k, v and gate, up fused on disk (Phi-3's), as the Llama or Mistral models that they are.

The same numbers in another order of rows: nothing is computed. What is written then is what every other program reads,
and extends: transformers' Phi3 class takes no RoPE scaling but its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from parallel.errors import ConfigError
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.planning.arch import CONVERTED, LlamaArch
from pipeline.planning.tensors import PROJECTIONS, projection_shape
from pipeline.storage.safetensors import TensorFact, tensor_digest

LONGROPE = ("longrope", "su", "yarn")
"""What a Phi-3 config.json calls its own RoPE, over the years."""
_OWN = ("embd_pdrop", "resid_pdrop", "original_max_position_embeddings", "auto_map")
"""Keys of Phi-3's that the others do not have; the dropouts are of its first training."""
FUSED = {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}
"""Module -> projections, in the order of its rows."""


def as_llama(config: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """config.json of the same model with its projections apart; None: they are.

    Args:
        path: where `config` was read, for the sentences.

    Raises:
        ConfigError: its RoPE has no place in the other classes.
    """
    if not CONVERTED.intersection(config.get("architectures") or ()):
        return None
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key)
        kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else None
        if kind in LONGROPE:
            raise ConfigError(
                f"model.path: {path}: its RoPE is {kind}, which turns by other angles where a text is longer than the "
                "original context, and is not supported; use a release without it (Phi-3-mini-4k, "
                "Phi-3-medium-4k, phi-4)."
            )
    windowed = config.get("sliding_window") is not None
    # transformers' defaults of Phi-3, where those of the other classes differ.
    defaults = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 32000}
    found = {**defaults, **{key: value for key, value in config.items() if key not in _OWN}}
    found |= {
        "architectures": ["MistralForCausalLM" if windowed else "LlamaForCausalLM"],
        "model_type": "mistral" if windowed else "llama",
        "num_key_value_heads": config.get("num_key_value_heads") or config.get("num_attention_heads"),
    }
    return found


class SplitCheckpoint(HfCheckpoint):
    """A folder with fused projections, whose tensors go by the names they have apart.

    Args:
        arch: of the model.
        pickled: see `HfCheckpoint`.

    Raises:
        CheckpointError: see `HfCheckpoint`.
    """

    def __init__(self, folder: Path, arch: LlamaArch, pickled: bool = False) -> None:
        super().__init__(folder, pickled)
        self._pieces: dict[str, tuple[str, int]] = {}
        """Name -> the stored tensor it is part of, and its first row there."""
        for stored, fact in list(self.facts.items()):
            module = stored.removesuffix(".weight")
            for fused, parts in FUSED.items():
                rows = [projection_shape(part, arch)[0] for part in parts]
                if not module.endswith(f".{fused}") or fact.shape[:1] != (sum(rows),):
                    continue  # `check` names what is left over
                file, first = self._file.pop(stored), 0
                del self.facts[stored]
                for part, count in zip(parts, rows, strict=True):
                    name = f"{module.removesuffix(fused)}{PROJECTIONS[part][0]}.weight"
                    self.facts[name] = TensorFact((count, *fact.shape[1:]), fact.dtype)
                    self._file[name], self._pieces[name] = file, (stored, first)
                    first += count

    def tensor(self, name: str) -> torch.Tensor:
        """As `HfCheckpoint.tensor`."""
        if name not in self._pieces:
            return super().tensor(name)
        return self.slice(name, 0, 0, self.facts[name].shape[0])

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """As `HfCheckpoint.slice`."""
        if name not in self._pieces:
            return super().slice(name, dim, start, stop)
        stored, first = self._pieces[name]
        rows = (start, stop) if dim == 0 else (0, self.facts[name].shape[0])
        found = self._handle(name).slice(stored, 0, first + rows[0], first + rows[1])
        return found if dim == 0 else found[:, start:stop]

    def digest(self, name: str) -> str:
        """As `HfCheckpoint.digest`."""
        if name not in self._pieces:
            return super().digest(name)
        return tensor_digest(self.tensor(name))
