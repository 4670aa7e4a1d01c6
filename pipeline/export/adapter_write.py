"""Adapters out: a PEFT folder, and LongLoRA's two files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from parallel.errors import CheckpointError
from pipeline.export.adapter_read import ADAPTER, EMBEDDING, HEAD, PREFIX, ROWS, TRAINABLE
from pipeline.export.trained_model import TrainedModel, companions, extended_config, partner_of
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.hf.companions import GENERATION
from pipeline.hf.vocabulary import VOCABULARY_HF
from pipeline.hf.writer import NOTE, check_space, new_folder, trained_finite
from pipeline.planning.tensors import NORMS
from pipeline.storage.json_file import write_json
from pipeline.storage.safetensors import TensorFact, write_safetensors

EMBEDDINGS = ("auto", "whole", "rows")
FEW = 8
"""`auto` keeps single rows where at most one in so many changed."""
PEFT_MINIMUM = "0.18"
"""`ensure_weight_tying` appeared there; without it tied output weights would stay those of the base."""
PEFT_TESTED = "0.18.0 and 0.21.2"
README = """# LongLoRA adapter, context {context}

RoPE scaling is part of the model, and a PEFT adapter cannot carry it: the base model must be loaded with this folder's
`config.json`, which declares it ({rope}). Without it the adapter computes nonsense.

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained({folder!r})
base = AutoModelForCausalLM.from_pretrained({base!r}, config=config{mismatch})
{grow}model = PeftModel.from_pretrained(base, {folder!r})
{stop}```

Made at step {step} from a base whose hash is `{base_hash}`. Needs peft >= {peft} (tested with {tested}); embedding
and norms are in {saved}.{form}
"""
LONGLORA_README = """# LongLoRA's two files, context {context}

`{trainable}.safetensors` and `.bin` (the same tensors; LongLoRA's scripts read the `.bin`) hold embedding and norms,
`{adapter}.safetensors` the LoRA factors. Merge with `longspan merge --adapter THIS --base BASE --context
{context}`, or with LongLoRA's `merge_lora_weights_and_save_hf_model.py`. RoPE: {rope}.
Base hash `{base_hash}`, step {step}.{form}
"""
FORM_NOTES = {"bf16": ""} | {
    form: f"\n\nTrained on a base whose matrices were kept in {said} (`model.base: {form}`); it is to be used with, "
    "and merged into, the matrices as they are in the base's folder. Its loss was measured with the rounded ones."
    for form, said in (("fp8", "8 bits, FP8"), ("nf4", "4 bits, NF4 as QLoRA's"))
}
"""What a README says of the base in training, by model.base."""


def strength_note(strength: float) -> str:
    """What a README says of weights part of the way from the base's to the trained ones; of all the way nothing."""
    if strength == 1:
        return ""
    return f"\n\n`--strength {strength:g}`: weights {strength:.0%} of the way from the base's to the trained ones."


def _changed_rows(model: TrainedModel, base: HfCheckpoint) -> list[int] | None:
    """Embedding rows that training changed; None where PEFT's single rows cannot hold what was trained."""
    if EMBEDDING not in model.trained or model.grown:
        return None
    if model.arch.tied and HEAD in model.trained:
        return None
    old = base.tensor(EMBEDDING)
    new = model.trained[EMBEDDING].to(old.dtype)
    # Of bits: a NaN must count as changed.
    differ = (new.view(torch.uint8) != old.view(torch.uint8)).any(dim=1)
    return [int(row) for row in differ.nonzero().flatten()]


def peft_config(model: TrainedModel, rows: list[int] | None = None) -> dict[str, Any]:
    """adapter_config.json; see `PEFT_MINIMUM` for the versions that read it.

    PEFT matches `modules_to_save` by the end of a module's name, so the final norm needs its parent to not mean them
    all.

    Args:
        rows: embedding rows kept singly (`trainable_token_indices`); None keeps the embedding whole.

    Raises:
        CheckpointError: PEFT cannot express what was trained.
    """
    whole = {name for name in model.trained if partner_of(name) is None}
    if rows is not None:
        whole -= {EMBEDDING}
    if model.grown:
        # PEFT leaves what it is not given at the base's, which has no such rows.
        whole |= set(VOCABULARY_HF) if not model.arch.tied else {EMBEDDING}
    saved = {
        "model.norm" if name == "model.norm.weight" else name.removesuffix(".weight").split(".")[-1] for name in whole
    }
    norms = [norm.split(".")[-1] for norm in NORMS]
    for module in norms:
        count = sum(name.endswith(f"{module}.weight") for name in whole)
        if count not in (0, model.arch.layers):
            raise CheckpointError(
                f"{module}: trained in {count} of {model.arch.layers} layers, where PEFT needs all; export as merged."
            )
    odd = saved - {"model.norm", *norms, "embed_tokens", "lm_head"}
    if odd:
        raise CheckpointError(
            f"{sorted(odd)[0]}: whole base matrices were trained, which a PEFT adapter does not hold; export as merged."
        )
    if not model.adapters:
        raise CheckpointError("The checkpoint holds no LoRA adapters, and PEFT cannot do without; export it as merged.")
    # By their ends where they are in every layer, as PEFT's users write them.
    adapted = {name.rsplit(".", 2)[0] for name in model.adapters}
    ends = {module.split(".")[-1] for module in adapted}
    config = {
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
        "target_modules": sorted(ends if len(adapted) == len(ends) * model.arch.layers else adapted),
        "modules_to_save": sorted(saved) or None,
        "ensure_weight_tying": model.arch.tied and "embed_tokens" in saved,
    }
    if rows is not None:
        config["trainable_token_indices"] = {"embed_tokens": rows}
    return config


def _plan(model: TrainedModel, embedding: str) -> tuple[dict[str, Any], list[int] | None]:
    """adapter_config.json, and the embedding rows kept singly (None: it is whole)."""
    rows = None
    if embedding != "whole":
        rows = _changed_rows(model, HfCheckpoint(model.base))
        if embedding == "rows" and not rows:
            raise CheckpointError(
                "--embedding rows: needs an embedding that trained, without added tokens; use --embedding whole."
            )
        if embedding == "auto" and (not rows or len(rows) * FEW > model.arch.vocab):
            rows = None
    return peft_config(model, rows), rows


def export_adapter(model: TrainedModel, output: Path, force: bool = False, embedding: str = "whole") -> None:
    """Write a PEFT folder: adapters in fp32, embedding and norms in the base's dtype, and the extended config.json.

    Args:
        embedding: whole (`modules_to_save`), rows (only changed ones, `trainable_token_indices`), or auto: rows where
            at most one in `FEW` changed.

    Raises:
        CheckpointError: `output` is taken, PEFT cannot express what was trained, a tensor is not finite, or the disk
            refuses.
    """
    config, rows = _plan(model, embedding)
    base = HfCheckpoint(model.base)
    sources = {PREFIX + name: name for name in model.trained}
    for module in config["modules_to_save"] or ():
        if module in ("embed_tokens", "lm_head"):
            # PEFT gives tied output weights a wrapper of their own; those of a grown vocabulary are not the base's.
            name = EMBEDDING if module == "embed_tokens" else HEAD
            sources[PREFIX + name] = name
    if config["ensure_weight_tying"]:
        sources[PREFIX + HEAD] = EMBEDDING
    facts = {}
    if rows is not None:
        del sources[PREFIX + EMBEDDING]
        sources[PREFIX + EMBEDDING.removesuffix(".weight") + ROWS] = EMBEDDING
    for stored, name in sorted(sources.items()):
        dtype = torch.float32 if partner_of(name) else base.facts[name].dtype
        shape = model.shape(name) if name in model.trained else (model.arch.vocab, model.arch.hidden)
        facts[stored] = TensorFact((len(rows or ()), *shape[1:]) if stored.endswith(ROWS) else shape, dtype)

    def read(stored: str) -> torch.Tensor:
        name = sources[stored]
        whole = model.trained[name] if name in model.trained else model.base_tensor(base, name)
        if stored.endswith(ROWS):
            whole = whole[torch.tensor(rows)]
        return trained_finite(name, whole.to(facts[stored].dtype))

    saved = "`trainable_token_indices` and `modules_to_save`" if rows is not None else "`modules_to_save`"
    with new_folder(output, force) as folder:
        check_space(folder, sum(fact.nbytes for fact in facts.values()))
        write_json(folder / "adapter_config.json", config)
        write_safetensors(folder / f"{ADAPTER}.safetensors", facts, read, {})
        _notes(model, folder, README, Path(output), saved, len(set(sources.values())))


def export_longlora(model: TrainedModel, output: Path, force: bool = False) -> None:
    """Write LongLoRA's two files: `adapter_model` (LoRA only) and `trainable_params` (embedding, norms, as .safetensors
    and, for the published scripts, .bin).

    Raises:
        CheckpointError: `output` is taken, there are no adapters, a tensor is not finite, or the disk refuses.
    """
    base = HfCheckpoint(model.base)
    if not model.adapters:
        raise CheckpointError("The checkpoint holds no LoRA adapters; export it as merged.")
    plain = [name for name in sorted(model.trained) if partner_of(name) is None]
    config = {**peft_config(dataclasses.replace(model, trained=_only(model, model.adapters), arch=_base_arch(model)))}
    factors = {PREFIX + name: TensorFact(model.shape(name), torch.float32) for name in model.adapters}
    whole = {name: TensorFact(model.shape(name), base.facts[name].dtype) for name in plain}
    if model.grown and EMBEDDING not in whole:
        whole[EMBEDDING] = TensorFact((model.arch.vocab, model.arch.hidden), base.facts[EMBEDDING].dtype)

    def read(name: str) -> torch.Tensor:
        tensor = model.trained[name] if name in model.trained else model.base_tensor(base, name)
        return trained_finite(name, tensor.to(whole[name].dtype))

    def read_factor(stored: str) -> torch.Tensor:
        name = stored.removeprefix(PREFIX)
        return trained_finite(name, model.trained[name].float())

    with new_folder(output, force) as folder:
        check_space(folder, sum(f.nbytes for f in factors.values()) + 2 * sum(f.nbytes for f in whole.values()))
        write_json(folder / "adapter_config.json", {**config, "modules_to_save": None, "ensure_weight_tying": False})
        write_safetensors(folder / f"{ADAPTER}.safetensors", factors, read_factor, {})
        write_safetensors(folder / f"{TRAINABLE}.safetensors", whole, read, {})
        # Plain tensors in a dict: readers need no code of ours, and weights_only=True suffices.
        with (folder / f"{TRAINABLE}.bin").open("wb") as file:
            torch.save({name: read(name).contiguous() for name in whole}, file)
            file.flush()
            os.fsync(file.fileno())
        _notes(model, folder, LONGLORA_README, Path(output), f"`{TRAINABLE}`", len(factors) + len(whole))


def _only(model: TrainedModel, kept: list[str]) -> Mapping[str, torch.Tensor]:
    return {name: model.trained[name] for name in kept}


def _base_arch(model: TrainedModel) -> Any:
    """Without added rows: they are in `trainable_params`."""
    rows = HfCheckpoint(model.base).facts[EMBEDDING].shape[0]
    return dataclasses.replace(model.arch, vocab=rows)


def _notes(model: TrainedModel, folder: Path, readme: str, output: Path, saved: str, tensors: int) -> None:
    """config.json, tokenizer, longspan.json and README.md beside an adapter of so many trained tensors."""
    write_json(folder / "config.json", extended_config(model))
    companions(model, folder)
    plan = dataclasses.asdict(model.rope)
    note = {"format": 1, "base": str(model.base), "base_hash": model.base_hash, "step": model.step}
    # Counted, so that a reader notices a file or tensor that was lost on the way.
    note |= {"context": model.context, "tensors": tensors, "trained_on": model.form}
    if model.chat is not None:
        note["chat"] = model.chat.recorded()
    if model.strength != 1:
        note["strength"] = model.strength
    rope = {"type": model.rope.type, "theta": model.rope.theta, "factor": model.rope.factor}
    write_json(folder / NOTE, {**note, "rope": rope, "rope_plan": plan, "peft": f">={PEFT_MINIMUM}"})
    rows = model.arch.vocab
    # config.json declares the grown vocabulary, so transformers makes fresh rows and says so.
    grow = f"# {rows} rows: the new ones are in the adapter\n" if model.grown else ""
    # PEFT generates by the base's own, which may know no end of an answer.
    stop = ""
    if model.chat is not None and (folder / GENERATION).is_file():
        stop = (
            "from transformers import GenerationConfig  # where answers end\n\n"
            f"model.generation_config = GenerationConfig.from_pretrained({str(output.resolve())!r})\n"
        )
    text = readme.format(
        context=model.context,
        rope=f"type {model.rope.type}, theta {model.rope.theta:g}, factor {model.rope.factor:g}",
        folder=str(output.resolve()),
        base=str(model.base),
        step=model.step,
        base_hash=model.base_hash,
        peft=PEFT_MINIMUM,
        tested=PEFT_TESTED,
        saved=saved,
        grow=grow,
        stop=stop,
        mismatch=", ignore_mismatched_sizes=True" if model.grown else "",
        adapter=ADAPTER,
        trainable=TRAINABLE,
        form=FORM_NOTES[model.form] + strength_note(model.strength),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
