"""From trained tensors to what others load: a merged Hugging Face model, a PEFT adapter, LongLoRA's files. CPU only.

Weights stream tensor by tensor, so memory holds one base tensor and one trained tensor at a time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from parallel.errors import CheckpointError, ConfigError
from pipeline.export.adapter_write import export_adapter, export_longlora
from pipeline.export.trained_model import TrainedModel, companions, extended_config
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.hf.writer import SHARD_BYTES, resumable_folder, trained_finite, write_safetensors_sharded
from pipeline.planning.arch import read_arch
from pipeline.planning.tensors import hf_tensor_shapes, is_derived
from pipeline.reporting.progress import ByteProgress
from pipeline.storage.json_file import write_json
from pipeline.storage.safetensors import TensorFact

FORMATS = ("adapter", "merged", "longlora")


def source_files(checkpoint: HfCheckpoint) -> list[tuple[str, int, int]]:
    """Name, bytes and time of change of every weight file: tells an edited source from the one a job began with."""
    facts = [(file, (checkpoint.folder / file).stat()) for file in checkpoint.files]
    return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in facts]


def _job(model: TrainedModel, base: HfCheckpoint, shard_bytes: int) -> dict[str, Any]:
    """What decides the bytes of a merged export."""
    source = model.source or Path()
    trained = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(source.glob("*")) if p.is_file()]
    where = str(source.resolve()) if model.source else os.getpid()
    origin = {"base": source_files(base), "source": where, "trained": trained, "shard_bytes": shard_bytes}
    return {
        **origin,
        "config": extended_config(model),
        "lora": str(model.lora),
        "step": model.step,
        "strength": model.strength,
        "chat": None if model.chat is None else model.chat.recorded(),
    }


def export_merged(
    model: TrainedModel, output: Path, force: bool = False, shard_bytes: int = SHARD_BYTES, shown: bool = False
) -> None:
    """Write a plain Hugging Face model with the training merged into the weights, in the base's dtype.

    Interrupted, the same call goes on where it stopped.

    Args:
        shown: display progress.

    Raises:
        CheckpointError: `output` is taken or overlaps what is read, the base does not fit its config.json, or the disk
            refuses; or a merged tensor is not finite.
    """
    _refuse_overlaps(model, output)
    base = HfCheckpoint(model.base)
    base.check(hf_tensor_shapes(read_arch(model.base)), is_derived)
    facts = {name: TensorFact(shape, base.facts[name].dtype) for name, shape in hf_tensor_shapes(model.arch).items()}
    total = sum(fact.nbytes for fact in facts.values())

    def read(name: str) -> torch.Tensor:
        stored = model.base_tensor(base, name)
        return trained_finite(name, model.merged(name, stored)) if model.changes(name) else stored

    with (
        resumable_folder(output, force, _job(model, base, shard_bytes)) as folder,
        ByteProgress(total, "merge", enabled=shown) as progress,
    ):
        write_json(folder / "config.json", extended_config(model))
        companions(model, folder)
        write_safetensors_sharded(folder, facts, read, shard_bytes, progress)


def export(
    model: TrainedModel,
    output: Path,
    form: str,
    force: bool = False,
    embedding: str = "whole",
    shown: bool = False,
) -> None:
    """Write `form` (adapter | merged | longlora) into `output`, whole or not at all.

    Raises:
        ConfigError: no such form.
        CheckpointError: see `export_adapter`, `export_longlora` and `export_merged`.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format: {form!r} is not one of {', '.join(FORMATS)}.")
    _refuse_overlaps(model, output)
    if form != "merged" and model.foreign is not None:
        raise CheckpointError(
            f"{model.source}: has {model.foreign}, which Longspan merges and does not write; export it as merged."
        )
    if form == "merged":
        export_merged(model, output, force, shown=shown)
    elif form == "adapter":
        export_adapter(model, output, force, embedding)
    else:
        export_longlora(model, output, force)


def refuse_overlap(source: Path, output: Path, what: str) -> None:
    """--force must never replace what is read, nor a folder that holds it; nor is anything written into it.

    Links are followed, those of single files too: a folder of links reads what lies elsewhere.

    Args:
        what: what to call `source`.

    Raises:
        CheckpointError: they overlap.
    """
    home, target = source.resolve(), Path(output).resolve()
    read = [home, *(path.resolve() for path in (source.iterdir() if source.is_dir() else ()))]
    if home in target.parents or any(target == path or target in path.parents for path in read):
        raise CheckpointError(f"{output}: overlaps {what}; choose another output folder.")


def _refuse_overlaps(model: TrainedModel, output: Path) -> None:
    refuse_overlap(model.base, output, "the base model's folder")
    if model.source is not None:
        refuse_overlap(model.source, output, "the folder of the adapter or checkpoint")
