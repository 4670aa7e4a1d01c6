"""A model loaded to be evaluated: as shipped, with stretched RoPE but untrained, trained, or with an adapter."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError, ConfigError
from parallel.world.collectives import share_from_main
from parallel.world.groups import Groups, destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline.build import build_model, connect, open_base
from pipeline.checkpoint.choose import newest
from pipeline.checkpoint.compatibility import OtherSetting, check_resumable, check_settings
from pipeline.checkpoint.manifest import folder_name, read_manifest
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.tensors import whole_trained
from pipeline.config.run import RunConfig
from pipeline.config.sections import LoraConfig
from pipeline.config.yaml_file import config_dict
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.evaluation.grid import fit_ranks
from pipeline.evaluation.kept import OF_RUN, PART
from pipeline.export.adapter_read import load_adapter_of
from pipeline.export.part_way import PartWay, part_way
from pipeline.export.trained_model import TrainedModel
from pipeline.hf.companions import has_tokenizer
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import load_trained, mark_trainable
from pipeline.planning.run_plan import RunPlan, plan_run
from pipeline.planning.tensors import to_ours
from pipeline.planning.trainable import kind_of
from pipeline.storage.digest import sha256_of
from pipeline.training.planned import settled
from pipeline.training.state import check_trained

_EARLIER = "earlier"


@dataclass(frozen=True)
class LoadedState:
    """A model as `load_state_of` makes it, on this rank."""

    label: str
    """As in `EvalReport`."""
    step: int
    """Optimizer steps it was trained for."""
    context: int
    """Tokens it is made for."""
    base_context: int
    """Tokens the base was made for, as its config.json says."""
    model: RankModel
    groups: Groups
    tokenizer: TextTokenizer
    identity: Mapping[str, Any]
    """What tells it from other models: base, positions, checkpoint, dtype."""
    plan: RunPlan
    """As its ranks run it."""
    model_of: str
    """See `same_model`."""


def _as_evaluated(config: dict[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings with the checkpoint's model.fp8_recipe, which evaluations have no use for: a machine without
    Transformer Engine evaluates with model.family: local."""
    model = recorded.get("model")
    trained_in = model.get("fp8_recipe", "none") if isinstance(model, Mapping) else "none"
    return {**config, "model": {**config["model"], "fp8_recipe": trained_in}}


@contextlib.contextmanager
def load_state_of(
    config: RunConfig, env: RankEnv, state: str, checkpoint: Path | None = None, strength: float = 1.0
) -> Iterator[LoadedState]:
    """A model as shipped, untrained, trained or with an adapter, ready to be evaluated; collective.

    `shipped` ignores model.rope; `trained` reads `checkpoint`, or the run's newest; `adapter` reads a folder of
    adapters. Whatever grid the run trains on, the ranks that are there do.

    Args:
        state: shipped | untrained | trained | adapter.
        checkpoint: with `trained` and `adapter`.
        strength: likewise; of the way from the base's weights to the trained ones (`PartWay`).

    Raises:
        ConfigError, CheckpointError, DataError: one sentence each.
    """
    config, _ = settled(config, env, resumes=False)
    trained_with, config = config, fit_ranks(config, env.world_size)
    plan = plan_run(config, env.world_size)
    if state == "shipped":
        plan = plan.as_shipped()
    base, model = open_base(config, plan.arch), None
    try:
        groups = connect(plan, env, base)
        if state == "trained":
            folder = Path(share_from_main(groups, lambda: str(checkpoint or _newest(config))))
            # Told before the model is loaded; the base's hash is looked at after it.
            recorded = read_manifest(folder).raw.get("config", {})
            compared = _as_evaluated(config_dict(trained_with), recorded)
            try:
                check_settings(recorded, compared)
            except OtherSetting as error:
                run = folder.parent.parent / "config.yaml"
                mend = f"give --config {run}, the settings it was trained with" if run.is_file() else "restore it"
                raise ConfigError(f"{error.found}; {mend}.") from None
        adapter = None
        if state == "adapter":
            assert checkpoint is not None
            base_hash = share_from_main(groups, base.base_hash)
            adapter = part_way(read_adapter(checkpoint, config, base_hash), strength)
            kinds = tuple(sorted(set(map(kind_of, parameters_of(adapter)))))
            config = replace(config, train=replace(config.train, trainable=kinds))
            plan = replace(plan, config=config, arch=adapter.arch, rope=adapter.rope)
        trained_with_it = None if adapter is None else adapter.tokenizer
        if trained_with_it is None or not has_tokenizer(trained_with_it):
            trained_with_it = Path(config.model.path)
        tokenizer = load_tokenizer(Path(config.data.tokenizer or trained_with_it))
        lora = config.lora if state == "trained" and "lora" in config.train.trainable else LoraConfig(rank=0)
        if adapter is not None:
            lora = adapter.lora
        model = build_model(plan, lora, groups, base)
        base_hash = share_from_main(groups, base.base_hash)
        identity = {"base": base_hash, "rope": asdict(plan.rope), "vocab": plan.arch.vocab, "dtype": str(model.dtype)}
        if config.model.base != "bf16":
            identity["form"] = config.model.base
        step = 0
        if state == "trained":
            own = {"base_hash": base_hash, "config": compared}
            with CheckpointReader(folder) as reader:
                saved = reader.manifest
                check_resumable(saved.raw, {**own, "data_fingerprint": saved.raw["data_fingerprint"]})
                mark_trainable(model, config.train.trainable)
                check_trained(model, config.train.trainable, reader)
            held = whole_trained(folder)
            load_trained(model, held if strength == 1 else PartWay(held, base, plan.arch.vocab, strength))
            step = saved.step
            identity["trained"] = hashlib.sha256(json.dumps(saved.raw, sort_keys=True).encode()).hexdigest()
        if adapter is not None:
            adapted = parameters_of(adapter)
            for name, parameter in model.canonical_parameters():
                parameter.requires_grad_(name in adapted)
            load_trained(model, adapter.trained)
            step = adapter.step
            assert checkpoint is not None
            identity["trained"] = hash_files(checkpoint)
        model.requires_grad_(False)
        # As the run calls it: `after` is its last.
        label = "after" if state in ("trained", "adapter") else state
        whose = ""
        if state != "adapter":
            trained_at = folder if state == "trained" else None
            whose = share_from_main(groups, lambda: _whose(trained_with, base_hash, trained_at))
        if whose == _EARLIER:
            label = folder_name(step)
        if strength != 1:
            part = identity["strength"] = f"{PART}{strength:g}"
            label = part if label == "after" else f"{label}-{part}"
        own_context = plan.arch.max_positions
        context = own_context if state == "shipped" else config.model.context
        model_of = OF_RUN if whose else hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        yield LoadedState(label, step, context, own_context, model, groups, tokenizer, identity, plan, model_of)
    finally:
        try:
            if model is not None:
                # Page-locked memory must be given back before it is freed.
                model.close()
        finally:
            destroy_groups()


def read_adapter(folder: Path, config: RunConfig, base_hash: str) -> TrainedModel:
    """A folder of adapters over the base, if it can be evaluated beside it.

    Raises:
        CheckpointError, ConfigError: see `load_adapter_of`; or it is computed merged only.
    """
    adapter, mend = load_adapter_of(folder, config.model, base_hash), "merge it (longspan merge) and evaluate that"
    if adapter.foreign is not None:
        raise CheckpointError(f"{folder}: has {adapter.foreign}, which is computed merged only; {mend} with --model.")
    if "base" in map(kind_of, parameters_of(adapter)):
        raise CheckpointError(f"{folder}: holds whole projections; {mend} with --model.")
    return adapter


def _whose(config: RunConfig, base_hash: str, checkpoint: Path | None) -> str:
    """OF_RUN for the model of the run whose folder is `config.output`, as far as its checkpoints tell.

    _EARLIER for what that run had trained before its newest checkpoint; empty for another run's model.

    Args:
        checkpoint: of what was trained, by these settings; None: it is the base.
    """
    folder = Path(config.output) / "checkpoints"
    saved = newest(folder)
    if checkpoint is not None:
        if checkpoint.resolve().parent != folder.resolve():
            return ""
        return OF_RUN if saved is None or checkpoint.resolve() == saved.resolve() else _EARLIER
    if saved is None:
        return ""
    recorded, own = read_manifest(saved).raw, config_dict(config)["model"]
    theirs = recorded.get("config", {}).get("model", {})
    alike = all(theirs.get(name) == own[name] for name in ("context", "rope", "vocab", "base"))
    return OF_RUN if alike and recorded.get("base_hash") == base_hash else ""


def parameters_of(trained: TrainedModel) -> set[str]:
    """Our names of what was trained."""
    return {to_ours(name)[0] for name in trained.trained}


def hash_files(folder: Path) -> str:
    """sha256 over a folder's files: their names and contents."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(path.name.encode() + bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()


def _newest(config: RunConfig) -> str:
    """The run's newest whole checkpoint."""
    folder = newest(Path(config.output) / "checkpoints")
    if folder is None:
        raise CheckpointError(f"{config.output}: has no checkpoint yet; train first, or evaluate another state.")
    return str(folder)
