"""The one composition root: configuration in, a ready run out. The order of every step reads here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from parallel.axes.zero3 import FrozenShards, deepspeed_config
from parallel.errors import ConfigError
from parallel.health.watch import Watch, collective_timeout_s
from parallel.world.collectives import on_main_first, require_same, share_from_main
from parallel.world.groups import Groups, make_groups
from parallel.world.rank_env import RankEnv
from parallel.world.rng import seed_everything
from pipeline.checkpoint.compatibility import DataStart, check_output
from pipeline.checkpoint.saver import CheckpointSaver
from pipeline.config.run import RunConfig
from pipeline.config.sections import LoraConfig
from pipeline.config.yaml_file import config_dict
from pipeline.data.answer_ends import trained_format
from pipeline.data.chat_settings import check_prepared
from pipeline.data.document_ends import Ends
from pipeline.data.loader import TrainLoader
from pipeline.data.mixed import open_windows
from pipeline.data.prepare import left_out, open_text_or_shards
from pipeline.data.readings import differing_readings
from pipeline.data.shards import TokenShards, is_prepared
from pipeline.data.tokenizer import TextTokenizer, check_rows, load_tokenizer
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.hf.weight_source import WeightSource
from pipeline.model.attention.backends import select_backend
from pipeline.model.layers.transformer_engine import check_transformer_engine
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import init_adapters, load_base, mark_trainable, trainable
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.base_form import capability_of, check_fp8
from pipeline.planning.run_plan import RunPlan
from pipeline.planning.tensors import hf_tensor_shapes, is_derived
from pipeline.reporting.progress import TokenProgress
from pipeline.training.init_from import (
    Start,
    check_fits,
    check_source,
    find_source,
    open_source,
    other_form,
    other_positions,
)
from pipeline.training.invariants import run_checks
from pipeline.training.non_finite import DivergenceGuard
from pipeline.training.optimizer import TrainableAdamW
from pipeline.training.rank_facts import rank_facts
from pipeline.training.reduction import GradientReduction
from pipeline.training.restore import layout_of, resume
from pipeline.training.run_record import Run
from pipeline.training.shared_output import check_shared
from pipeline.training.spikes import SpikeWatch
from pipeline.training.state import load_weights, own_pieces
from pipeline.training.trainer import Trainer, TrainerParts


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """bf16 or fp32; `auto` is bf16 on a GPU and fp32 on a CPU, whose bf16 arithmetic is emulated."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def open_base(config: RunConfig, arch: LlamaArch) -> HfCheckpoint:
    """The base checkpoint, its tensors those config.json describes: checked before a model is allocated.

    Raises:
        CheckpointError: a file is damaged, or a tensor missing, misshaped or unknown (named).
    """
    base = HfCheckpoint(Path(config.model.path))
    # Added tokens have no rows there yet.
    base.check(hf_tensor_shapes(replace(arch, vocab=read_arch(base.folder).vocab)), is_derived)
    return base


def check_family(config: RunConfig, device: torch.device) -> None:
    """Refuse a machine that lacks what model.family's layers are made of.

    Raises:
        ConfigError: it does.
    """
    if config.model.family == "te":
        check_transformer_engine(device, config.model.fp8_recipe)


def check_backend(config: RunConfig, arch: LlamaArch, device: torch.device) -> torch.dtype:
    """The dtype the model has on this device, in which attention.backend, model.family and model.base can run there.

    Raises:
        ConfigError: it cannot, or model.base cannot be multiplied with there.
            Asked before anything is tokenized or loaded, not at the first forward.
    """
    dtype = compute_dtype(config.model.dtype, device)
    check_family(config, device)
    if device.type == "cuda":
        capability = capability_of(torch.cuda.get_device_capability(device))
        check_fp8(config.model.base, config.model.fp8_recipe, capability, torch.cuda.get_device_name(device))
    if config.model.base == "fp8" and device.type == "cuda" and dtype is not torch.bfloat16:
        raise ConfigError(
            f"model.base: fp8 has products in bf16 on a GPU, and model.dtype is {config.model.dtype}; set "
            "model.dtype: bf16, or another model.base."
        )
    select_backend(config.attention.backend, device, dtype, arch.head_dim)
    return dtype


def build_model(plan: RunPlan, lora: LoraConfig, groups: Groups, base: WeightSource) -> RankModel:
    """Allocate this rank's part of the model on its device and fill it; nothing is marked trainable.

    Args:
        lora: adapters; rank 0 where none train.

    Raises:
        ConfigError: attention.backend or model.family cannot run here.
        CheckpointError: a tensor is missing or misshaped.
    """
    dtype = check_backend(plan.config, plan.arch, groups.device)
    if plan.config.train.stream == "auto":
        # Machines of unlike GPUs would cut sequences differently, and wait for each other's halos for ever.
        require_same(groups, {"train.stream: auto": str(plan.stream)})
    parallel, train = plan.config.parallel, plan.config.train
    shards = None
    if parallel.engine == "zero3":
        offload, grid = parallel.offload.params == "cpu", plan.grid
        described = deepspeed_config(dtype, train.micro_batch, plan.batch.accumulation, grid.dp * grid.cp)
        shards = FrozenShards(groups, offload, described, parallel.offload.ahead)
    model = RankModel(
        plan.arch,
        plan.rope,
        lora,
        groups,
        dtype,
        plan.recompute,
        plan.chunks,
        shards=shards,
        kinds=train.trainable,
        family=plan.config.model.family,
        without=train.without,
        stream=plan.stream,
        prefill=plan.prefill,
        base=plan.config.model.base,
        recipe=plan.config.model.fp8_recipe,
    )
    load_base(model, base)
    init_adapters(model, train.seed)
    return model


def connect(plan: RunPlan, env: RankEnv, base: WeightSource | None = None, fake: bool = False) -> Groups:
    """Join the other ranks (or, `fake`, pretend to: see `make_groups`) and seed.

    Args:
        base: the weights this rank would start from; with them the ranks compare what they have before anything else.

    Raises:
        ConfigError: this rank lacks its GPU, or the ranks have not the same settings, program or base.
    """
    config, parallel = plan.config, plan.config.parallel
    facts = rank_facts(config, base) if base is not None and env.world_size > 1 and not fake else None
    if facts is not None:
        # `auto` looks at each machine's GPUs, and ranks that compute other things again would wait for each other.
        facts["what layers keep (train.recompute)"] = " ".join(plan.recompute)
    timeout_s = collective_timeout_s(parallel.timeout_s)
    groups = make_groups(plan.grid, env, timeout_s, virtual=parallel.virtual, fake=fake, facts=facts)
    if groups.device.type == "cpu":
        # Bit-equal resumes and replicas; on a GPU the deterministic kernels would cost speed.
        torch.use_deterministic_algorithms(True)
    # Ranks with other tokens or other layers draw other dropout masks. Tensor-parallel ranks, neighbours on the fastest
    # axis, share a stream: megatron's tracker tells them apart where they must differ.
    seed_everything(config.train.seed, env.rank // plan.grid.tp)
    return groups


def open_tokens(
    config: RunConfig, source: str, tokenizer: TextTokenizer, groups: Groups, watch: Watch | None = None
) -> TokenShards:
    """Open prepared shards, or tokenize raw text once (rank 0, which shows it) and share it through the cache folder.

    Args:
        watch: learns that a tokenization of hours gets on.
    """
    cache = Path(config.data.cache or Path(config.output) / "data")
    touch = (watch or Watch()).touch
    ends = Ends(config.data.bos, config.data.eos, several=len(config.data.sources) > 1)
    require_same(groups, {"the tokenizer": tokenizer.fingerprint})
    with TokenProgress(enabled=groups.is_main, touch=touch) as progress:
        shards = on_main_first(
            groups, lambda: open_text_or_shards(Path(source), cache, tokenizer, config.data.text_field, progress, ends)
        )
    # A machine may have a copy of its own, and an older one.
    setting = next((name for name, path in config.data.named_sources.items() if path == source), "eval.path")
    require_same(groups, {f"what {setting} holds (sha256 of its tokens)": shards.fingerprint})
    return shards


def build(
    plan: RunPlan,
    env: RankEnv,
    base: WeightSource | None = None,
    fake: bool = False,
    watch: Watch | None = None,
    still_ours: Callable[[], None] | None = None,
) -> Run:
    """Compose a training run, resumed from its newest checkpoint when there is one.

    Args:
        plan: of the run, for as many ranks as `env` counts.
        env: this process among its peers.
        base: weights to start from; None: those of `model.path`.
        fake: be one rank of a world that is not there, for measuring.
        watch: learns that long work, as tokenizing, gets on.
        still_ours: see `CheckpointSaver`; None: nobody else can take the output folder.

    Raises:
        ConfigError, CheckpointError, DataError: one sentence each, before anything is trained.
    """
    config, arch = plan.config, plan.arch
    check_family(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    # `resume` looks again, at the base's hash and the data too
    if check_output(config) is None and config.init_from is not None:
        check_source(config.init_from)
    check_prepared(config)
    base = base or open_base(config, arch)
    groups = connect(plan, env, base, fake)
    check_shared(groups, Path(config.output))
    check_backend(config, arch, groups.device)
    tokenizer = load_tokenizer(Path(config.data.tokenizer or config.model.path))
    check_rows(tokenizer, arch.vocab)
    sources = config.data.sources
    if groups.is_main and not all(is_prepared(Path(source.path)) for source in sources):
        for warning in differing_readings(tokenizer):
            print(f"warning: {warning}", file=sys.stderr)
    stores = [open_tokens(config, source.path, tokenizer, groups, watch) for source in sources]
    dataset = open_windows(sources, stores, config.sequence, config.data.mask_documents)
    require_same(groups, {"data.path's sources and their shares": dataset.fingerprint})
    loader = TrainLoader(
        dataset,
        seed=config.train.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=groups.data_rank,
        world=groups.plan.dp,
        mask_documents=config.data.mask_documents,
    )
    trains_lora = "lora" in config.train.trainable
    lora = config.lora if trains_lora else replace(config.lora, rank=0)
    model = build_model(plan, lora, groups, base)
    mark_trainable(model, config.train.trainable)
    if model.stream is not None:
        # Now, not in the first step: what cannot be had is told before anything is trained.
        model.stream.reserve(config.train.micro_batch, config.sequence, plan.attention)
    optimizer = TrainableAdamW(
        ((name, "lora" if kind == "lora" else "other", parameter) for name, kind, parameter in trainable(model)),
        betas=config.train.betas,
        eps=config.train.eps,
        weight_decay=config.train.weight_decay,
        clip=config.train.clip,
        group=groups.data,
        offload=config.parallel.offload.optimizer == "cpu",
    )
    manifest: dict[str, Any] = {
        "config": config_dict(config),
        "layout": layout_of(config, groups),
        "base": str(Path(config.model.path).resolve()),
        "base_hash": share_from_main(groups, base.base_hash),
        "data_fingerprint": dataset.fingerprint,
        "data_start": asdict(DataStart()),
        "changes": [],
        "init_from": None,
        "chat": chat_of(dataset.stores),
    }
    parts = TrainerParts(
        config=config,
        groups=groups,
        model=model,
        optimizer=optimizer,
        reduction=GradientReduction(groups, model),
        loader=loader,
        guard=DivergenceGuard(config.train.bad_steps, arch.vocab),
        saver=CheckpointSaver(
            Path(config.output) / "checkpoints",
            groups,
            config.save.keep,
            config.save.keep_every,
            config.save.background,
            still_ours or (lambda: None),
        ),
        spec=plan.attention,
        full_spec=plan.full_attention,
        manifest=manifest,
        checks=run_checks(groups, model, optimizer) if config.checks else None,
        spikes=SpikeWatch(config, groups, loader, optimizer, manifest)
        if config.train.rerun_spikes and not fake
        else None,
    )
    choice = resume(parts)
    start = 0 if choice is None else choice.step
    begun = begin_from(parts, base) if choice is None and config.init_from is not None else None
    if parts.checks is not None:
        if begun is None:
            parts.checks.at_start(start)
        else:
            parts.checks.check_replicas(start, everything=True)
    parts.saver.prepare(own_pieces(model, config.train.trainable, optimizer))
    return Run(plan, groups, Trainer(parts, start), tokenizer, choice, _passed_over(config, base, groups), begun)


def _passed_over(config: RunConfig, base: WeightSource, groups: Groups) -> tuple[str, ...]:
    """See `Run.warnings`."""
    if not groups.is_main:
        return ()
    named = [*(source.path for source in config.data.sources), config.eval.path]
    texts = [Path(path) for path in named if path is not None]
    return (*base.warnings, *(line for path in texts for line in left_out(path, config.data.text_field)))


def chat_of(stores: Sequence[TokenShards]) -> dict[str, Any] | None:
    """What a checkpoint says of the conversations it trained on, see `answer_ends`; None: there are none."""
    found, _ = trained_format(store.manifest for store in stores)
    return None if found is None else found.recorded()


def begin_from(parts: TrainerParts, base: WeightSource) -> Start:
    """Take the trained weights that `init_from` names; collective.

    Raises:
        ConfigError: there are none, or they do not fit this run.
        CheckpointError: they are damaged.
    """
    config, model = parts.config, parts.model
    assert config.init_from is not None
    path = config.init_from
    folder = Path(share_from_main(parts.groups, lambda: find_source(path)))
    with open_source(folder, config, parts.manifest["base_hash"]) as source:
        taken = check_fits(source, config, model.arch, model.lora, base)
        load_weights(model, parts.optimizer, taken, source.weights.read)
        warnings = *other_positions(source, model.rope), *other_form(source, config.model.base)
        begun = replace(source.start, warnings=warnings)
    parts.manifest["init_from"] = begun.recorded()
    if parts.manifest["chat"] is None and source.chat is not None:
        parts.manifest["chat"] = source.chat.recorded()
    return begun
