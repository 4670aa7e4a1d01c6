"""From a checkpoint of trained tensors to what others load: a merged Hugging Face model or a PEFT adapter. CPU only.

Weights stream tensor by tensor, so memory holds the trained state and one base tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parallel.errors import CheckpointError, ConfigError
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.tensors import whole_trained
from pipeline.hf_companions import copy_companions, write_json
from pipeline.hf_files import (
    SHARD_BYTES,
    HfCheckpoint,
    TensorFact,
    new_folder,
    write_safetensors,
    write_safetensors_sharded,
)
from pipeline.model import names
from pipeline.model.arch import LlamaArch, read_arch
from pipeline.model.rope import ROPE_KEYS, RopePlan, hf_rope_fields, plan_rope
from pipeline.schema import LoraConfig, RopeSettings

FORMATS = ("adapter", "merged")
EMBEDDING = "model.embed_tokens.weight"
README = """# LongLoRA adapter, context {context}

RoPE scaling is part of the model, and a PEFT adapter cannot carry it: the base model must be loaded with this folder's
`config.json`, which declares it ({rope}). Without it the adapter computes nonsense.

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained("{folder}")
base = AutoModelForCausalLM.from_pretrained({base!r}, config=config)
model = PeftModel.from_pretrained(base, "{folder}")
```

Made at step {step} from a base whose hash is `{base_hash}`. Needs peft >= {peft}.
"""
PEFT_MINIMUM = "0.18"
"""`ensure_weight_tying` appeared there; without it tied output weights would stay those of the base."""


@dataclass(frozen=True)
class TrainedModel:
    """A base model and what was trained on it, all that an export needs."""

    base: Path
    """Hugging Face folder."""
    base_hash: str
    arch: LlamaArch
    rope: RopePlan
    context: int
    """Tokens the result declares."""
    lora: LoraConfig
    trained: Mapping[str, torch.Tensor]
    """Canonical names -> tensors, as in a checkpoint."""
    step: int

    def __post_init__(self) -> None:
        allowed = names.hf_tensor_shapes(self.arch) | names.adapter_shapes(self.arch, self.lora)
        for name, tensor in self.trained.items():
            if name not in allowed:
                raise CheckpointError(f"{name}: the checkpoint trained it, but base {self.base} has no place for it.")
            if tuple(tensor.shape) != allowed[name]:
                raise CheckpointError(
                    f"{name}: has shape {tuple(tensor.shape)} in the checkpoint and {allowed[name]} by its config and "
                    f"base {self.base}; give the base it was trained on."
                )
            partner = _partner(name)
            if partner is not None and partner not in self.trained:
                raise CheckpointError(f"{partner}: is missing beside {name}; the checkpoint is incomplete.")

    @property
    def adapters(self) -> list[str]:
        """Canonical names of the adapters' tensors, sorted."""
        return sorted(name for name in self.trained if _partner(name) is not None)

    def merged(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """A base tensor after training, in the base's dtype; W + scale B A is added up in fp32."""
        if name in self.trained:
            return self.trained[name].to(base.dtype)
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" not in self.trained:
            return base
        low, high = (self.trained[f"{stem}.lora_{side}.weight"].float() for side in "AB")
        return (base.float() + self.lora.scale * (high @ low)).to(base.dtype)


def _partner(name: str) -> str | None:
    """The other factor of an adapter; None for other tensors."""
    for one, other in ((".lora_A.weight", ".lora_B.weight"), (".lora_B.weight", ".lora_A.weight")):
        if name.endswith(one):
            return name.removesuffix(one) + other
    return None


def load_trained_model(checkpoint: Path, base: Path | None = None) -> TrainedModel:
    """Read a checkpoint folder, verified against its checksums, and check that the base is the one it was trained on.

    Args:
        base: where the base model lies now; None takes the path the run recorded.

    Raises:
        CheckpointError: the checkpoint is damaged, or the base is missing or another model.
    """
    manifest = read_manifest(checkpoint).raw
    try:
        config = manifest["config"]
        model, lora = config["model"], config["lora"]
        rope = RopeSettings(**model["rope"])
        adapters = LoraConfig(**{**lora, "targets": tuple(lora["targets"])})
        context, recorded, expected = int(model["context"]), str(manifest["base"]), str(manifest["base_hash"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: its manifest lacks what an export needs ({type(error).__name__}: {error}); export another "
            "checkpoint."
        ) from None
    folder = Path(base) if base is not None else Path(recorded)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: the base model is not there; say where it lies with --base.")
    found = HfCheckpoint(folder).base_hash()
    if found != expected:
        raise CheckpointError(
            f"{folder}: is not the base {checkpoint} was trained on (hash {found[:12]}, expected {expected[:12]}); "
            "give that one with --base."
        )
    arch = read_arch(folder)
    plan = plan_rope(arch, rope, context)
    trained = whole_trained(checkpoint)
    return TrainedModel(folder, expected, arch, plan, context, adapters, trained, int(manifest["step"]))


def extended_config(model: TrainedModel) -> dict[str, Any]:
    """config.json of the base with the new RoPE and context, readable by transformers 4 and 5."""
    config = json.loads((model.base / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in ROPE_KEYS}
    return {**kept, **hf_rope_fields(model.rope, model.arch, model.context)}


def export_merged(model: TrainedModel, output: Path, force: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a plain Hugging Face model with the training merged into the weights, in the base's dtype.

    Raises:
        CheckpointError: `output` is taken, the base does not fit its config.json, or the disk refuses.
    """
    _refuse_overlap(model, output)
    base = HfCheckpoint(model.base)
    shapes = names.hf_tensor_shapes(model.arch)
    base.check(shapes, names.is_derived)
    with new_folder(output, force) as folder:
        write_json(folder / "config.json", extended_config(model))
        copy_companions(model.base, folder, model.context)
        facts = {name: base.facts[name] for name in shapes}
        write_safetensors_sharded(folder, facts, lambda name: model.merged(name, base.tensor(name)), shard_bytes)


def peft_config(model: TrainedModel) -> dict[str, Any]:
    """adapter_config.json; see `PEFT_MINIMUM` for the versions that read it.

    PEFT matches `modules_to_save` by the end of a module's name, so the final norm needs its parent to not mean them
    all.
    """
    whole = {name for name in model.trained if _partner(name) is None}
    saved = {
        "model.norm" if name == "model.norm.weight" else name.removesuffix(".weight").split(".")[-1] for name in whole
    }
    for module in ("input_layernorm", "post_attention_layernorm"):
        count = sum(name.endswith(f"{module}.weight") for name in whole)
        if count not in (0, model.arch.layers):
            raise CheckpointError(
                f"{module}: trained in {count} of {model.arch.layers} layers, where PEFT needs all; export as merged."
            )
    odd = saved - {"model.norm", "input_layernorm", "post_attention_layernorm", "embed_tokens", "lm_head"}
    if odd:
        raise CheckpointError(
            f"{sorted(odd)[0]}: whole base matrices were trained, which a PEFT adapter does not hold; export as merged."
        )
    if not model.adapters:
        raise CheckpointError("The checkpoint holds no LoRA adapters, and PEFT cannot do without; export it as merged.")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model.base),
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": model.lora.dropout,
        "use_rslora": model.lora.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted({name.split(".")[-3] for name in model.adapters}),
        "modules_to_save": sorted(saved) or None,
        "ensure_weight_tying": model.arch.tied and "embed_tokens" in saved,
    }


def export_adapter(model: TrainedModel, output: Path, force: bool = False) -> None:
    """Write a PEFT folder: adapters in fp32, embedding and norms whole in the base's dtype, and the extended
    config.json.

    Raises:
        CheckpointError: `output` is taken, PEFT cannot express what was trained, or the disk refuses.
    """
    _refuse_overlap(model, output)
    config = peft_config(model)
    base = HfCheckpoint(model.base)
    sources = {name: name for name in model.trained}
    if config["ensure_weight_tying"]:
        # PEFT gives the tied output layer a wrapper of its own and looks for its weight too.
        sources["lm_head.weight"] = EMBEDDING
    tensors: dict[str, torch.Tensor] = {}
    for name, source in sources.items():
        adapter = _partner(name) is not None
        tensors[f"base_model.model.{name}"] = model.trained[source].to(
            torch.float32 if adapter else base.facts[source].dtype
        )
    facts = {name: TensorFact(tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(tensors.items())}
    with new_folder(output, force) as folder:
        write_json(folder / "adapter_config.json", config)
        write_json(folder / "config.json", extended_config(model))
        copy_companions(model.base, folder, model.context)
        write_safetensors(folder / "adapter_model.safetensors", facts, tensors.__getitem__, {})
        rope = {"type": model.rope.type, "theta": model.rope.theta, "factor": model.rope.factor}
        note = {"base": str(model.base), "base_hash": model.base_hash, "step": model.step, "context": model.context}
        write_json(folder / "longspan.json", {**note, "rope": rope})
        text = README.format(
            context=model.context,
            rope=f"type {model.rope.type}, theta {model.rope.theta:g}, factor {model.rope.factor:g}",
            folder=Path(output).resolve(),
            base=str(model.base),
            step=model.step,
            base_hash=model.base_hash,
            peft=PEFT_MINIMUM,
        )
        (folder / "README.md").write_text(text, encoding="utf-8")


def export(model: TrainedModel, output: Path, form: str, force: bool = False) -> None:
    """Write `form` (adapter | merged) into `output`, whole or not at all.

    Raises:
        ConfigError: no such form.
        CheckpointError: see `export_adapter` and `export_merged`.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format: {form!r} is not one of {', '.join(FORMATS)}.")
    (export_adapter if form == "adapter" else export_merged)(model, output, force)


def _refuse_overlap(model: TrainedModel, output: Path) -> None:
    """--force must never replace the base, nor a folder that holds it."""
    base, target = model.base.resolve(), Path(output).resolve()
    if target == base or target in base.parents or base in target.parents:
        raise CheckpointError(f"{output}: overlaps the base model's folder; choose another output.")
